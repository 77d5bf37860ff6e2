"""Sums and means over the rows of all ranks. Ranks may have different numbers of rows, or none; a mean over nothing is
0. What a rank's own rows give is for figures, and no loss.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.core.distributed import all_reduce_sums


def sum_over_rows(local: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The sum of `local` over all ranks and the number of their rows, in one collective and without reading a number
    from the device.
    """
    total, all_rows = all_reduce_sums(local, torch.full((), rows, dtype=local.dtype, device=local.device))
    return total, all_rows.detach()


def mean_of(total: Tensor, entries: int) -> Tensor:
    """A mean over the entries of all ranks from the sum over those of this one and their number."""
    total, count = sum_over_rows(total, entries)
    return total / count.clamp_min(1)


def mean(x: Tensor) -> Tensor:
    """Over the entries of all ranks, a scalar; 0, with gradient 0, without any."""
    return mean_of(x.sum(), x.numel())


def own_mean(x: Tensor) -> Tensor:
    """Over the entries of this rank, a scalar, for a figure; 0 without any."""
    return x.sum() / max(x.numel(), 1)


def known_mean(x: Tensor, known: Tensor) -> Tensor:
    """Over the known entries of all ranks, a scalar; 0, with gradient 0, if nothing is known.

    Args:
        known: bool, of a shape that expands to that of `x`; entries that are not known may hold anything.
    """
    known = known.expand_as(x)
    total, count = all_reduce_sums(x.where(known, 0).sum(), known.sum().to(x.dtype))
    return total / count.clamp_min(1)


def squared_error(x: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference over the entries of all ranks, a scalar in float32 or wider; 0, with gradient 0, without
    any.
    """
    return mean_of(F.mse_loss(wide(x), wide(target), reduction="sum"), x.numel())


def squared_error_at(x: Tensor, target: Tensor, at: Tensor) -> Tensor:
    """Mean squared difference over the entries of all ranks at which `at`, bool of one shape with both, holds: a scalar
    in float32 or wider; 0 without any. Others may hold anything.
    """
    return known_mean((wide(x) - wide(target)).where(at, 0).square(), at)


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Of the losses of several tasks, scalars, each times the weight of its name; at least one."""
    first, *others = (weights[name] * loss for name, loss in losses.items())
    return sum(others, first)
