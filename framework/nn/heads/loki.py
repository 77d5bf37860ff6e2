"""A head without weights that turns logits of some labels into scores of all: Loki, as a module.

Source: arXiv 2307.12226; `lightspan.evaluation.label_spaces.loki` says more, and never holds a matrix as large as this
one.
Shapes: K observed labels, N labels.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.distributed import register_replicated
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_temperatures


class LokiHead(nn.Module):
    """Scores -softmax(logits / T) D^2: [... K] -> [... N], in float32 or wider. The largest is the prediction.

    Behind the logits of any classifier: `nn.Sequential(model, LokiHead(metric.squared(observed)))`. It has a gradient,
    so that one may also train through it with the scores as logits, as the authors' code does.

    Args:
        squared_KN: squared distances of the K labels whose logits come in, in their order, to all labels, at least 0
            and finite.
        temperature: T, above 0 and finite; near 0 the label with the largest logit wins.
    """

    squared_KN: Tensor

    def __init__(self, squared_KN: Tensor, temperature: float = 1.0) -> None:
        super().__init__()
        squared_KN = squared_KN.float()  # which has no number for the squares of distances above 1e19
        if squared_KN.ndim != 2 or not squared_KN.numel() or not (squared_KN.isfinite() & (squared_KN >= 0)).all():
            raise UserError(
                f"LokiHead squared_KN {list(squared_KN.shape)} must be finite squares of distances [K, N], of at least "
                "one label"
            )
        require_temperatures(temperature=temperature)
        register_replicated(self, "squared_KN", squared_KN)
        self.temperature = temperature
        self.in_features, self.out_features = squared_KN.shape

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        squared_KN = self.squared_KN
        super()._apply(fn, recurse)
        if self.squared_KN.dtype != squared_KN.dtype:  # half precision has one number for several labels' distances
            self.squared_KN = squared_KN.to(self.squared_KN.device)
        return self

    def forward(self, logits_K: Tensor) -> Tensor:
        with torch.autocast(logits_K.device.type, enabled=False):
            p_K = (wide(logits_K) / self.temperature).softmax(dim=-1)
            return -(p_K @ self.squared_KN.to(p_K.dtype))
