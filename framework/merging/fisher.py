"""The Fisher-weighted average: each model counts where its likelihood says that an entry matters to it.

Source: Matena, Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, arXiv 2111.09832:

    theta = sum_i w_i F_i theta_i / sum_i w_i F_i        entry by entry,

with F_i the diagonal of the i-th model's Fisher matrix on its own data, which
`lightspan.evaluation.weights.merging_statistics.DiagonalFisher` writes. Entries that no F_i speaks for (sum_i w_i F_i
at or below `floor` times the tensor's largest) and tensors without one, such as running statistics, take the plain
average; the paper gives the former the numbers of one model that is named as the target. The scale of all F_i together
cancels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.files.tensors import Form
from lightspan.merging.merger import Merger
from lightspan.merging.span import in_span_as
from lightspan.merging.weights import StatisticsFiles, Weights


class FisherAverage(Merger):
    """The first checkpoint named leads.

    Args:
        statistics: of each checkpoint by its name, a safetensors file of F >= 0 by tensor name.
        weights: w_i of each checkpoint by name, above 0; None weighs all alike.
        floor: share of the largest sum_i w_i F_i of a tensor that an entry's has to be above, in [0, 1).
    """

    def __init__(
        self, statistics: dict[str, ReadPath], weights: dict[str, float] | None = None, floor: float = 1e-12
    ) -> None:
        if weights is not None and not all(0 < w < math.inf for w in weights.values()):
            raise UserError(f"FisherAverage weights={weights} must each be above 0 and finite")
        if not 0 <= floor < 1:
            raise UserError(f"FisherAverage floor={floor} must be in [0, 1): a share of the tensor's largest entry")
        self.weights, self.floor = weights, floor
        self._fishers = StatisticsFiles("FisherAverage", statistics)

    def leading(self, names: Sequence[str]) -> str:
        self._fishers.require(names)
        if self.weights is not None and set(self.weights) != set(names):
            raise UserError(f"FisherAverage weighs {', '.join(self.weights)}; the checkpoints are {', '.join(names)}")
        return names[0]

    def prepared(self, checkpoints: Mapping[str, Weights], forms: Mapping[str, Form]) -> Self:
        self._fishers.require_tensors(forms)
        return self

    def tensor(self, name: str, form: Form, weights: Mapping[str, Tensor]) -> Tensor:
        models = list(weights.values())
        fishers = self._fishers.of(name, list(weights))
        if fishers is None or not form.numbers:
            return in_span_as(form.dtype, models[0], models, torch.full((len(models),), 1 / len(models)).double())
        for fisher in fishers:
            if fisher.shape != form.shape or not bool((fisher.double() >= 0).all()):
                raise UserError(
                    f"FisherAverage: F of {name} is {list(fisher.shape)} for a tensor {list(form.shape)}, or has "
                    "entries below 0; compute it anew with DiagonalFisher"
                )
        own = [1.0 if self.weights is None else self.weights[n] for n in weights]
        shares = torch.stack([w * fisher.double() for w, fisher in zip(own, fishers, strict=True)])
        total = shares.sum(dim=0)
        spoken_for = total > self.floor * total.max()
        return in_span_as(form.dtype, models[0], models, torch.where(spoken_for, shares / total, 1 / len(models)))
