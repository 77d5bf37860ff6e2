"""Rows at length 1 of what is measured. Shapes: D features."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightspan.devices import wide


def unit_rows(x: Tensor) -> Tensor:
    """Rows [... D] divided by their length, in float32 or wider; a row of zeros stays one.

    For features and weights as they are, of any scale: a row of 1e-30 or 1e30 has length 1 here as well. In a loss,
    which such a row would give gradients of 1e30, `lightspan.unit_length.unit_length` or
    `lightspan.objectives.info_nce.unit` takes its place.
    """
    x = wide(x)
    if not x.shape[-1]:
        return x
    # Divided by the largest entry first: squares of small numbers vanish, those of large ones overflow.
    return normalize(normalize(x, p=torch.inf, dim=-1, eps=torch.finfo(x.dtype).tiny), dim=-1)
