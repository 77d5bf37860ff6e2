"""The shared mask of Concrete subspace merging: one logit an entry, one draw for all task vectors.

Source: Tang, Shen, Luo, Ding, Hu, Du, Tao, "Concrete Subspace Learning based Interference Elimination for Multi-task
Model Fusion", 2023, arXiv 2312.06173:

    m = sigmoid((log u - log(1 - u) + x) / T),    tau_i' = tau_i m / mean(m)

with the mean inside each tensor, through which the gradient flows. The draw is a function of (seed, step, tensor name).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.subspaces.masks.distributions import concrete, require_temperature, threshold
from lightspan.subspaces.masks.draws import uniform

Final = Literal["sample", "mean", "threshold"]


class ConcreteMask(nn.Module):
    """Args:
    shapes: of the tensors by name.
    temperature: T, above 0.
    start: x at the beginning; 0 is a mean mask of 0.5.
    final: the mask after training: one Concrete "sample" as in training, which is the paper's (here always the same
        one), the "mean" sigmoid(x), or 1 above the "threshold" x = 0 and 0 elsewhere.
    seed: of the draws.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        temperature: float = 0.5,
        start: float = 0.0,
        final: Final = "sample",
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_temperature(temperature)
        if final not in ("sample", "mean", "threshold"):
            raise UserError(f"final={final!r} must be sample, mean or threshold")
        self.temperature, self.final, self.seed = temperature, final, seed
        self._row = {name: row for row, name in enumerate(shapes)}
        self.logits = nn.ParameterList([nn.Parameter(torch.full(shape, start)) for shape in shapes.values()])
        # A decay would pull masks to 1/2, so none of the logits is a matrix to an optimiser.
        kinds = {str(row): "vectors" for row in self._row.values()}
        self.logits.parameter_kinds = kinds  # type: ignore[assignment]  # a plain attribute, see `ParameterGroups`

    def drawn(self, step: int) -> dict[str, Tensor]:
        """m / mean(m) of each tensor, differentiable in the logits; other numbers at each step."""
        return {name: rescaled(self._sample(name, step)) for name in self._row}

    def settled(self) -> dict[str, Tensor]:
        """m / mean(m) as it is after training. The sample is that of step -1, which no training step draws."""
        of = {
            "sample": lambda name: self._sample(name, -1),
            "mean": lambda name: self.logits[self._row[name]].sigmoid(),
            "threshold": lambda name: threshold(self.logits[self._row[name]]).float(),
        }[self.final]
        return {name: rescaled(of(name)) for name in self._row}

    def density(self) -> Tensor:
        """Expected share of entries above one half."""
        total = sum(x.sigmoid().sum() for x in self.logits)
        return torch.as_tensor(total / max(1, sum(x.numel() for x in self.logits)))

    def _sample(self, name: str, step: int) -> Tensor:
        x_S = self.logits[self._row[name]]
        return concrete(x_S, self.temperature, uniform(self.seed, step, name, x_S.shape, device=x_S.device))


def rescaled(mask_S: Tensor) -> Tensor:
    """m / mean(m), whose mean is 1, for a mask of one entry therefore always 1. A mask that is all 0 stays so."""
    mean = mask_S.mean()
    return torch.where(mean > 0, mask_S / mean.clamp_min(torch.finfo(mask_S.dtype).tiny), mask_S)
