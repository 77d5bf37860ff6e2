"""Norms of many tensors in a handful of kernels."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def square_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Squared Euclidean norms [T] in float32 or wider, in no particular order; infinite where a sum of squares is
    beyond that format, though torch may have added it up in a wider one.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_kind[tensor.device, torch.promote_types(tensor.dtype, torch.float32)].append(tensor)
    parts = [torch.stack(torch._foreach_norm(part, 2, dtype=dtype)) for (_, dtype), part in by_kind.items()]
    return torch.cat([part.to(parts[0].device) for part in parts]).square() if parts else torch.zeros(0)
