"""Vectors at length 1 in a network or a loss, where a vector of zeros must not blow up what is trained."""

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_LENGTH = 1e-12
"""A shorter vector counts as zero."""


def unit_length(x: Tensor, dim: int = -1) -> Tensor:
    """torch's `normalize`, bit for bit, but for vectors shorter than `LEAST_LENGTH`: these become zero and have no
    gradient, where torch multiplies it by 1 / `LEAST_LENGTH`.

    In the type of `x`; a network that gives half precision is widened first where digits matter. In float16, which has
    no number as small, vectors shorter than its least normal number, 6e-5, count as zero. What is measured and not
    trained takes `lightspan.evaluation.rows.unit_rows`.
    """
    least = max(LEAST_LENGTH, torch.finfo(x.dtype).tiny)
    short = x.detach().norm(dim=dim, keepdim=True) < least
    return F.normalize(x.masked_fill(short, 0), dim=dim, eps=least)
