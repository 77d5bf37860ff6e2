"""Rows of features at length 1. Shapes: N rows, D features."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def unit_rows(x_ND: Tensor) -> Tensor:
    """Rows divided by their length; a row of zeros stays one. Float32 or wider is meant."""
    # Divided by the largest entry first: squares of small numbers vanish, those of large ones overflow.
    return normalize(normalize(x_ND, p=torch.inf, eps=torch.finfo(x_ND.dtype).tiny)) if x_ND.shape[1] else x_ND
