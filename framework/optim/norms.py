"""Norms of many tensors in a few kernels, and clipping by them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightspan.devices import wide_type
from lightspan.optim.elementwise import real
from lightspan.optim.sharding import Ranks, total_over
from lightspan.sharded import local


def square_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Squared Euclidean norms [T] in float32 or wider, in no particular order; infinite if a sum of squares is
    beyond that format, even if torch summed it in a wider one.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_kind[tensor.device, wide_type(tensor.dtype)].append(tensor)
    parts = [torch.stack(torch._foreach_norm(part, 2, dtype=dtype)) for (_, dtype), part in by_kind.items()]
    return torch.cat([part.to(parts[0].device) for part in parts]).square() if parts else torch.zeros(0)


def held_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of a gradient, in real numbers."""
    assert parameter.grad is not None
    return real(local(parameter.grad))


def clip_factor(squares: Iterable[tuple[Ranks | None, Tensor]], max_norm: float) -> Tensor:
    """The factor, 0-d and at most 1, that brings the global norm down to `max_norm`, as in clip_grad_norm_.

    Args:
        squares: squared norms, each with the ranks among which its tensor is split.
    """
    norm = total_over(squares).sqrt()
    return (max_norm / (norm + 1e-6)).clamp_max(1.0)
