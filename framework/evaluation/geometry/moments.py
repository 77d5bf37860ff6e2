"""Counts, means and scatter of rows in batches and on several ranks, in float64.

Two sets are combined with the difference of their means (Chan, Golub, LeVeque, "Updating formulae and a pairwise
algorithm for computing sample variances", 1979), never by sums of squares: features far from the origin lose no digits,
and constant ones have a scatter of exactly zero, however they are split.

Shapes: B rows of a batch, D features, C classes; of a pair of features, E columns of the second.
"""

from dataclasses import dataclass
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from lightspan.core.devices import widest_float
from lightspan.core.distributed import all_reduce_max, all_reduce_sum, world_size
from lightspan.core.errors import UserError
from lightspan.evaluation.labels import require_few_classes


@dataclass(frozen=True)
class Moments:
    """Statistics of rows, class by class; rows without labels are one class.

        sums = Moments.of(x, label) + Moments.of(more_x, more_label)   # any batches, in any order
        sums.over_ranks().total().covariance()

    Attributes:
        count_C: rows of each class, whole numbers.
        mean_CD: their means; zeros for a class without rows.
        within_DD: sum over all rows of (x - m)(x - m)^T, m being the mean of the row's class.
    """

    count_C: Tensor
    mean_CD: Tensor
    within_DD: Tensor

    @classmethod
    def of(cls, x_BD: Tensor, label_B: Tensor | None = None, classes: int = 1) -> "Moments":
        """Moments of one batch; B may be 0.

        Args:
            x_BD: any dtype; without float64 on the device, the CPU computes.
            label_B: whole numbers from 0.
            classes: the least number of classes; labels may name more.
        Raises: UserError for rows that are not finite or not a matrix, or labels that do not match them or are
            so large that a row for each class would fill memory.
        """
        if x_BD.ndim != 2:
            raise UserError(f"moments need rows [B, D], but got {list(x_BD.shape)}; pool or flatten the features")
        device = x_BD.device if widest_float(x_BD.device) == torch.float64 else torch.device("cpu")
        x_BD = x_BD.detach().to(device, torch.float64)
        label_B = torch.zeros(len(x_BD), dtype=torch.int64) if label_B is None else label_B.detach()
        label_B = label_B.to(device)
        if label_B.shape != x_BD.shape[:1] or label_B.is_floating_point() or (len(label_B) and int(label_B.min()) < 0):
            raise UserError(
                f"moments by class need one whole number from 0 as the label of each of {len(x_BD)} rows, but got "
                f"{label_B.dtype} {list(label_B.shape)}"
            )
        if not x_BD.isfinite().all():
            raise UserError("features contain NaN or infinite values, which have no moments; the model has diverged")
        require_few_classes("moments by class", label_B)
        classes = max(classes, 1 + int(label_B.max())) if len(label_B) else classes
        count_C = torch.bincount(label_B, minlength=classes).double()
        # Relative to the first row: the mean of equal numbers has rounding errors, which would become the scatter.
        origin_1D = x_BD[:1] if len(x_BD) else x_BD.new_zeros(1, x_BD.shape[1])
        from_origin_BD = x_BD - origin_1D
        sum_CD = x_BD.new_zeros(classes, x_BD.shape[1]).index_add_(0, label_B, from_origin_BD)
        mean_CD = sum_CD / count_C.clamp_min(1)[:, None]
        apart_BD = from_origin_BD - mean_CD[label_B]
        there_C1 = (count_C > 0)[:, None]
        return cls(count_C, torch.where(there_C1, origin_1D + mean_CD, 0), apart_BD.T @ apart_BD)

    def __add__(self, other: "Moments") -> "Moments":
        classes = max(len(self.count_C), len(other.count_C))
        one, two = self._padded(classes), other._padded(classes)
        count_C = one.count_C + two.count_C
        share_C1 = (two.count_C / count_C.clamp_min(1))[:, None]
        both_C1 = ((one.count_C > 0) & (two.count_C > 0))[:, None]
        apart_CD = torch.where(both_C1, two.mean_CD - one.mean_CD, 0)
        mean_CD = torch.where((one.count_C > 0)[:, None], one.mean_CD + share_C1 * apart_CD, two.mean_CD)
        between_DD = (apart_CD * share_C1 * one.count_C[:, None]).T @ apart_CD
        return Moments(count_C, mean_CD, one.within_DD + two.within_DD + between_DD)

    def over_ranks(self) -> "Moments":
        """Those of the rows of all ranks together, the same on each. Every rank must call it, even one without rows.

        Means are gathered and combined like those of batches; of the scatter, D x D, only the sum is sent.
        """
        if world_size() == 1:
            return self
        own = self._padded(int(all_reduce_max(torch.tensor(len(self.count_C), device=self.count_C.device))))
        packed = torch.cat([own.count_C[:, None], own.mean_CD], dim=1)
        gathered = [torch.empty_like(packed) for _ in range(world_size())]
        dist.all_gather(gathered, packed)
        nothing_DD = torch.zeros_like(own.within_DD)
        joined = reduce(Moments.__add__, (Moments(part[:, 0], part[:, 1:], nothing_DD) for part in gathered))
        return Moments(joined.count_C, joined.mean_CD, joined.within_DD + all_reduce_sum(own.within_DD))

    def total(self) -> "Moments":
        """The moments of all rows as one class."""
        within_DD, nothing_DD = self.within_DD, torch.zeros_like(self.within_DD)
        each = (Moments(n[None], m[None], nothing_DD) for n, m in zip(self.count_C, self.mean_CD, strict=True))
        joined = reduce(Moments.__add__, each)
        return Moments(joined.count_C, joined.mean_CD, joined.within_DD + within_DD)

    @property
    def count(self) -> int:
        """Rows."""
        return int(self.count_C.sum())

    def covariance(self, correction: int = 1) -> Tensor:
        """Scatter within classes over (rows - correction), [D D]. Raises: UserError for too few rows."""
        if self.count <= correction:
            raise UserError(f"a covariance needs more than {correction} rows, but there are {self.count}; give more")
        return self.within_DD / (self.count - correction)

    def between(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows (x, y) side by side, x being the first `width` columns: the scatters xx [D D], xy [D E], yy [E E]."""
        s = self.within_DD
        return s[:width, :width], s[:width, width:], s[width:, width:]

    def _padded(self, classes: int) -> "Moments":
        more = classes - len(self.count_C)
        if not more:
            return self
        pad = torch.nn.functional.pad
        return Moments(pad(self.count_C, (0, more)), pad(self.mean_CD, (0, 0, 0, more)), self.within_DD)
