"""Running statistics of classes as a torchmetrics Metric, for training loops and for what sums over ranks there.

Shapes: B rows of a batch, D features, C classes.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.moments import Moments


class ClassMoments(Metric):
    """Counts, means and scatter of rows by class: `moments()` gives those of all rows of all ranks.

    The result does not depend on batches, their order, or ranks, but for rounding in float64. Ranks exchange one tensor
    [C + D, 1 + D]. A module that has it as an attribute saves it if it is made with `persistent`.

    Args:
        num_classes: C; labels are in [0, C).
        num_features: D.
        options: of torchmetrics.Metric.
    """

    higher_is_better = None
    is_differentiable = False
    full_state_update = False
    packed: Tensor

    def __init__(self, num_classes: int, num_features: int, persistent: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if num_classes < 1 or num_features < 1:
            raise UserError(
                f"ClassMoments num_classes={num_classes} and num_features={num_features} must be at least 1"
            )
        self.num_classes = num_classes
        empty = torch.zeros(num_classes + num_features, 1 + num_features, dtype=torch.float64)
        self.add_state("packed", empty, dist_reduce_fx=self._joined, persistent=persistent)

    def update(self, x_BD: Tensor, label_B: Tensor) -> None:
        """Raises: UserError as `Moments.of`, and for rows of another width or labels that are not below C."""
        found = Moments.of(x_BD, label_B, self.num_classes)
        if found.mean_CD.shape != (self.num_classes, self.packed.shape[1] - 1):
            raise UserError(
                f"ClassMoments of {self.num_classes} classes and {self.packed.shape[1] - 1} features got "
                f"{len(found.count_C)} classes of {x_BD.shape[1]} features"
            )
        self.packed = _packed(self._unpacked(self.packed) + _to(found, self.packed.device))

    def compute(self) -> Tensor:
        """What ranks exchange, [C + D, 1 + D]; read it by `moments`. (torchmetrics passes on tensors alone.)"""
        return self.packed

    def moments(self) -> Moments:
        """Of the rows of all ranks; each must call it."""
        return self._unpacked(self.compute())

    def _unpacked(self, packed: Tensor) -> Moments:
        classes, within = packed[: self.num_classes], packed[self.num_classes :]
        return Moments(classes[:, 0], classes[:, 1:], within[:, 1:])

    def _joined(self, gathered: Tensor) -> Tensor:
        return _packed(reduce(Moments.__add__, map(self._unpacked, gathered)))


def _packed(moments: Moments) -> Tensor:
    return torch.cat(
        [
            torch.cat([moments.count_C[:, None], moments.mean_CD], dim=1),
            torch.nn.functional.pad(moments.within_DD, (1, 0)),
        ]
    )


def _to(moments: Moments, device: torch.device) -> Moments:
    return Moments(moments.count_C.to(device), moments.mean_CD.to(device), moments.within_DD.to(device))
