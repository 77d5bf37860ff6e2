"""Rows of features at length 1. Shapes: D features."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightspan.devices import wide


def unit_rows(x: Tensor) -> Tensor:
    """Rows [... D] divided by their length, in float32 or wider; a row of zeros stays one."""
    x = wide(x)
    if not x.shape[-1]:
        return x
    # Divided by the largest entry first: squares of small numbers vanish, those of large ones overflow.
    return normalize(normalize(x, p=torch.inf, dim=-1, eps=torch.finfo(x.dtype).tiny), dim=-1)
