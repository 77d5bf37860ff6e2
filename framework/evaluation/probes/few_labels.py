"""Accuracy with few labels as a torchmetrics Metric: a linear probe that learns from a handful of samples a class.

Shapes: B rows of a batch, N of all, D features.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightspan.core.errors import UserError
from lightspan.evaluation.probes.linear_probe import fit_linear_probe


class FewLabelAccuracy(Metric):
    """Mean accuracy of `draws` linear probes, each fitted on `shots` rows of every class and scored on all others, in
    [0, 1].

    Rows of all ranks are drawn from together, by their numbers: the result depends neither on batches nor on ranks. All
    rows are kept until then.

    Args:
        shots: rows of each class to learn from, at least 1. Every class must have one more.
        draws: at least 1.
        l2: of `lightspan.evaluation.probes.linear_probe`, above 0.
        seed: of the draws.
        options: of torchmetrics.Metric.
    Raises: UserError for settings below their limits; in `compute` for a class with too few rows, or none.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    x: list[Tensor]
    label: list[Tensor]
    index: list[Tensor]

    def __init__(self, shots: int = 10, draws: int = 5, l2: float = 1.0, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        if shots < 1 or draws < 1 or not l2 > 0:
            raise UserError(f"FewLabelAccuracy shots={shots}, draws={draws} and l2={l2} must be at least 1, 1 and > 0")
        self.shots, self.draws, self.l2, self.seed = shots, draws, l2, seed
        for name in ("x", "label", "index"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, x_BD: Tensor, label_B: Tensor, index_B: Tensor) -> None:
        """Args: index_B: numbers of the samples, each once.

        Raises: UserError for another number of labels, or of numbers, than rows.
        """
        if x_BD.ndim != 2 or not label_B.shape == index_B.shape == x_BD.shape[:1]:
            raise UserError(
                "FewLabelAccuracy needs a label and a number for each row, and got rows "
                f"{list(x_BD.shape)}, labels {list(label_B.shape)} and numbers {list(index_B.shape)}"
            )
        self.x.append(x_BD.detach())
        self.label.append(label_B)
        self.index.append(index_B)

    def compute(self) -> Tensor:
        """Scalar in float64."""
        if not len(self.x):
            raise UserError("there is no row to learn from; FewLabelAccuracy needs an update before it is computed")
        x_ND, label_N, index_N = (dim_zero_cat(part).cpu() for part in (self.x, self.label, self.index))
        order = index_N.argsort()
        x_ND, label_N = x_ND[order], label_N[order]
        classes, count = label_N.unique(return_counts=True)
        if int(count.min()) <= self.shots:
            lacking = int(classes[count.argmin()])
            raise UserError(
                f"class {lacking} has {int(count.min())} rows, too few to learn from shots={self.shots} and score on "
                "another; lower shots, or give more rows"
            )
        generator = torch.Generator().manual_seed(self.seed)
        accuracies = [self._of_draw(x_ND, label_N, classes, generator) for _ in range(self.draws)]
        return torch.stack(accuracies).mean()

    def _of_draw(self, x_ND: Tensor, label_N: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
        shuffled = torch.randperm(len(label_N), generator=generator)
        given = torch.cat([shuffled[label_N[shuffled] == one][: self.shots] for one in classes])
        asked = torch.ones(len(label_N), dtype=torch.bool).index_fill(0, given, False)
        weight_DC, bias_C = fit_linear_probe(x_ND[given], label_N[given], self.l2)
        return ((x_ND[asked].double() @ weight_DC + bias_C).argmax(dim=1) == label_N[asked]).double().mean()
