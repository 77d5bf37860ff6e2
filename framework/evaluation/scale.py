"""Rows brought near 1 before their squares are taken: in float64 these overflow from 1e154 and vanish below 1e-154."""

import torch
from torch import Tensor

from lightspan.core.devices import widest_float


def scaled(*sets: Tensor) -> tuple[float, list[Tensor]]:
    """(s, the sets divided by s, in float64): a power of two, so nothing is rounded, with which they are near [-1, 1].

    Where the device has no float64, the sets are moved to the CPU. s is 1 for sets without a row or of zeros.
    """
    wide = [x if widest_float(x.device) == torch.float64 else x.cpu() for x in sets]
    wide = [x.detach().double() for x in wide]
    largest = max((float(x.abs().max()) for x in wide if x.numel()), default=0.0)
    exponent = int(torch.frexp(torch.tensor(largest, dtype=torch.float64)).exponent) if largest else 0
    scale = 2.0 ** max(-1000, min(exponent, 1000))  # its inverse must be a number too
    return scale, [x / scale for x in wide]
