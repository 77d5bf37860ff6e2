"""LoRA: a change of rank r, from two trained matrices.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685, equation 3:
y = W x + (alpha / r) B A x, with A random and B zero. For convolutions as in Hugging Face PEFT: A a kernel to r
channels, B a 1x1 kernel; this is the same on the weight read as a matrix [O I].
A trained change can be used at another alpha than it was trained with, between the frozen network (0) and the tuned
one: Xu et al., "PLLaVA", 2024, arXiv 2404.16994, section 3.3.
Shapes: O output features, I inputs of one of them (see `lightspan.adapters.layers`), R rank.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.adapter import Adapter, AdapterSpec
from lightspan.adapters.inject import adapted_layers
from lightspan.adapters.layers import fitting_rank, like
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in


@dataclass(frozen=True)
class LoRA(AdapterSpec):
    """Args:
    rank: r, from 1 to the rank of the layer's weight.
    alpha: the change is scaled by alpha / r, > 0; None is r, a scale of 1.
    dropout: share of its inputs that are dropped while training, in [0, 1).
    cap: whether a layer whose weight has a smaller rank uses that as its r; otherwise it is refused.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    cap: bool = False

    def __post_init__(self) -> None:
        require_in("[1, inf)", rank=self.rank)
        require_in("(0, inf)", alpha=self.alpha)
        require_in("[0, 1)", dropout=self.dropout)

    def build(self, layer: nn.Module, name: str) -> "LoRAUpdate":
        rank = fitting_rank(self.rank, layer, name, self.cap)
        scale = 1.0 if self.alpha is None else self.alpha / rank
        return LoRAUpdate(layer, rank, scale, self.dropout)


class LoRAUpdate(Adapter):
    """scale * up down, `down` drawn as nn.Linear draws its weights, `up` zero.

    Attributes:
        scale: alpha / r, >= 0; `rescale` changes it. A file has it only where it is not that of the spec.
    """

    def __init__(self, layer: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(layer)
        options = like(layer)
        self.down_RI = nn.Parameter(torch.empty(rank, self.layer.fan_in, **options))
        self.up_OR = nn.Parameter(torch.zeros(self.layer.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.down_RI, a=math.sqrt(5))
        self.scale = self.trained_scale = scale
        self.dropout = dropout

    @property
    def rank(self) -> int:
        """R."""
        return len(self.down_RI)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(self.down_RI.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return self.layer.up(self.layer.down(x, self.down_RI), self.up_OR * self.scale)

    def delta(self) -> Tensor:
        return self.layer.shaped(self.up_OR * self.scale @ self.down_RI)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.up_OR * self.scale, self.down_RI

    def stored(self) -> dict[str, Tensor]:
        own = {} if self.scale == self.trained_scale else {_SCALE: torch.tensor(self.scale, dtype=torch.float64)}
        return super().stored() | own

    def restore(self, tensors: dict[str, Tensor]) -> None:
        scale = tensors.get(_SCALE)
        if scale is not None and not (scale.numel() == 1 and 0 <= float(scale) < math.inf):
            raise UserError(f"not the tensors of this adapter: {_SCALE} must be one number, at least 0 and finite")
        super().restore({name: tensor for name, tensor in tensors.items() if name != _SCALE})
        if scale is not None:
            self.scale = float(scale)


_SCALE = "scale"


def rescale(model: nn.Module, alpha: float, name: str = "default") -> None:
    """Uses every LoRA of that name at alpha / r from now on, whatever it was trained with; nothing is trained.

    What is folded, merged or written for PEFT afterwards has this scale, and so has an adapter file.

    Args:
        alpha: at least 0; at 0 outputs are those of the frozen network.
    Raises: UserError for another alpha, or a model without such an adapter.
    """
    require_in("[0, inf)", alpha=alpha)
    for update in _updates(model, name):
        update.scale = alpha / update.rank


@contextmanager
def rescaled(model: nn.Module, alpha: float, name: str = "default") -> Iterator[None]:
    """Inside, `rescale`; afterwards the scales are as before."""
    before = {update: update.scale for update in _updates(model, name)}
    rescale(model, alpha, name)
    try:
        yield
    finally:
        for update in _updates(model, name):
            update.scale = before[update]


def _updates(model: nn.Module, name: str) -> list[LoRAUpdate]:
    """The LoRAs of that name, of layers that are not merged any more."""
    found = []
    for layer in adapted_layers(model).values():
        if name in layer.adapters and isinstance(update := layer.adapters[name], LoRAUpdate):
            layer.unmerge()
            found.append(update)
    if not found:
        raise UserError(
            f"alpha scales LoRAs, and no layer has one named {name!r}; add the callback "
            "lightspan.callbacks.training.adaptation.Adaptation with lightspan.adapters.lora.LoRA, or leave alpha out"
        )
    return found
