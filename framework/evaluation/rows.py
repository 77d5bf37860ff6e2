"""Rows of what is measured: at length 1, and fewer of them. Shapes: N rows, D features."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightspan.core.devices import wide


def unit_rows(x: Tensor) -> Tensor:
    """Rows [... D] divided by their length, in float32 or wider; a row of zeros stays one.

    For features and weights as they are, of any scale: a row of 1e-30 or 1e30 has length 1 here as well. In a loss,
    which such a row would give gradients of 1e30, `lightspan.core.unit_length.unit_length` or
    `lightspan.objectives.info_nce.unit` takes its place.
    """
    x = wide(x)
    if not x.shape[-1]:
        return x
    # Divided by the largest entry first: squares of small numbers vanish, those of large ones overflow.
    return normalize(normalize(x, p=torch.inf, dim=-1, eps=torch.finfo(x.dtype).tiny), dim=-1)


def spaced_rows(x_ND: Tensor, most: int) -> Tensor:
    """At most that many rows, evenly spaced in their order."""
    if len(x_ND) <= most:
        return x_ND
    return x_ND[torch.linspace(0, len(x_ND) - 1, most, dtype=torch.float64, device=x_ND.device).round().long()]
