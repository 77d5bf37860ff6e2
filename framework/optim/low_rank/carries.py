"""What becomes of moments when the frame of a matrix changes: known as moment rotation or projection-aware moments.

Shapes: B matrices, M rows, N columns (projected), R rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightspan.optim.low_rank.inner import largest_direction
from lightspan.optim.matrices.moments import MomentStorage
from lightspan.optim.matrices.stacks import State
from lightspan.triton_kernels.bias_correction import bias_correction


@dataclass(frozen=True)
class FrameChange:
    """Two frames of the same matrices, and what the new one captures.

    Args:
        make_old, make_new: return the frames [B N R] before and after.
        old, new: the basis' state before and after.
        coordinates_BMR: the present gradient in the new frame.
        betas: of Adam's moments.
    """

    make_old: Callable[[], Tensor]
    make_new: Callable[[], Tensor]
    old: State
    new: State
    coordinates_BMR: Tensor
    betas: tuple[float, float]

    # On demand: moments that follow columns, or stay where they are, need no frame. Kept in a dictionary, because
    # torch.compile cannot trace the lock in Python 3.11's cached_property.
    _made: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def old_BNR(self) -> Tensor:
        if "old" not in self._made:
            self._made["old"] = self.make_old()
        return self._made["old"]

    @property
    def new_BNR(self) -> Tensor:
        if "new" not in self._made:
            self._made["new"] = self.make_new()
        return self._made["new"]


@dataclass(frozen=True)
class Keep:
    """Moments stay as they are, in the coordinates of the old frame: GaLore, Fira and APOLLO do so."""

    def carry(self, moments: State, change: FrameChange, storage: MomentStorage, seed: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Rotate:
    """Rotation by the overlap O = Q_old^T Q_new, as in LDAdam (Robert et al. 2024, arXiv 2410.16103, section 3).

    On bias-corrected moments: the mean moves linearly, m O. The second moment splits into squared mean and variance,
    and variances of uncorrelated old coordinates add up with weights O^2: v <- |O^2 (v - m^2) + (m O)^2|.

    Args:
        floor: the value used for directions outside the old span. A new direction contains a share c_j = sum_i O_ij^2
            <= 1 of the old ones; about the rest, 1 - c_j, nothing is known but the present gradient, whose square is
            added with that weight. Variances below zero, which running means of unequal length allow, count as zero.
            Without it, as published, such a direction has a denominator near zero, which is here bounded so that
            the direction is no longer than Adam's can ever be, see `lightspan.optim.low_rank.inner.largest_direction`.
            (Published code has no such bound: where the terms of v cancel, it takes one step of m / eps.)
    """

    floor: bool = True

    def carry(self, moments: State, change: FrameChange, storage: MomentStorage, seed: Tensor) -> Tensor | None:
        overlap_BRR = change.old_BNR.mT @ change.new_BNR
        first_BMR = storage.load(moments, "exp_avg").to(overlap_BRR.dtype)  # float32 moments may serve float64 weights
        if "exp_avg_sq" not in moments:
            storage.save(first_BMR @ overlap_BRR, moments, "exp_avg", seed)
            return None
        corrections = [bias_correction(moments["age"], beta)[:, None] for beta in change.betas]
        second_BMR = storage.load(moments, "exp_avg_sq").to(overlap_BRR.dtype)
        mean_BMR, square_BMR = (m / c for m, c in zip((first_BMR, second_BMR), corrections, strict=True))
        variance_BMR, share_BRR = square_BMR - mean_BMR.square(), overlap_BRR.square()
        mean_BMR = mean_BMR @ overlap_BRR
        if self.floor:
            unknown_B1R = (1 - share_BRR.sum(dim=1, keepdim=True)).clamp_min(0)
            square_BMR = variance_BMR.clamp_min_(0) @ share_BRR
            square_BMR = (square_BMR + mean_BMR.square()).addcmul_(change.coordinates_BMR.square(), unknown_B1R)
        else:
            square_BMR = (variance_BMR @ share_BRR + mean_BMR.square()).abs_()
            square_BMR = torch.maximum(square_BMR, (mean_BMR / largest_direction(change.betas)).square_())
        storage.save(mean_BMR * corrections[0], moments, "exp_avg", seed)
        storage.save(square_BMR * corrections[1], moments, "exp_avg_sq", seed)
        return None


@dataclass(frozen=True)
class Gather:
    """For frames that are columns of one orthonormal matrix: their overlap is a partial permutation, so columns that
    stay keep their moments exactly and new ones start at zero.

    Args:
        own_age: whether a new column starts its own bias correction. With the age of the whole matrix, as
            published for DCT-AdamW, its first step is (1 - b1) / sqrt(1 - b2) times too long, 3.2 at (0.9, 0.999).
    """

    own_age: bool = True

    def carry(self, moments: State, change: FrameChange, storage: MomentStorage, seed: Tensor) -> Tensor | None:
        """Returns where each column's moments are now, -1 for nowhere [B R]: the inner rule moves them as it reads
        them.
        """
        same_BRR = change.old["columns"][:, :, None] == change.new["columns"][:, None, :]
        stays_BR, source_BR = same_BRR.any(dim=1), same_BRR.to(torch.int8).argmax(dim=1)
        if self.own_age and "age" in moments:
            moments["age"] = moments["age"].gather(1, source_BR) * stays_BR
        return torch.where(stays_BR, source_BR, -1)


Carry = Keep | Rotate | Gather
