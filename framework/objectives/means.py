"""Sums over the rows of all ranks, and means over entries, which are 0 if there are none: a rank may have no sample."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.devices import wide
from lightspan.distributed import all_reduce_sums


def sum_over_rows(local: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The sum of `local` over all ranks and the number of their rows, in one collective and without reading a number
    from the device.
    """
    total, all_rows = all_reduce_sums(local, torch.full((), rows, dtype=local.dtype, device=local.device))
    return total, all_rows.detach()


def mean(x: Tensor) -> Tensor:
    """Over all entries, a scalar; 0, with gradient 0, without entries."""
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
    """Mean squared difference over all entries, a scalar in float32 or wider; 0, with gradient 0, without entries."""
    x, target = wide(x), wide(target)
    return F.mse_loss(x, target) if x.numel() else F.mse_loss(x, target, reduction="sum")


def squared_error_at(x: Tensor, target: Tensor, at: Tensor) -> Tensor:
    """Mean squared difference over the entries of this rank at which `at`, bool of one shape with both, holds: a scalar
    in float32 or wider; 0 without any. Others may hold anything.
    """
    return (wide(x) - wide(target)).where(at, 0).square().sum() / at.sum().clamp_min(1)


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Of the losses of several tasks, scalars, each times the weight of its name; at least one."""
    first, *others = (weights[name] * loss for name, loss in losses.items())
    return sum(others, first)
