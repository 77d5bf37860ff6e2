"""Masks of rows of samples of any numbers of rows, packed, as functions of a seed for each sample.

Shapes: N rows of all samples, B samples.
"""

import torch
from torch import Tensor

from lightspan.core.noise import hashed_uniform, mixed_seed
from lightspan.core.ragged import ragged_ranks, row_owners


def hidden_rows(offsets: Tensor, share: float, seed_B: Tensor, may_N: Tensor) -> Tensor:
    """Which rows are hidden, bool [N]: of the n rows of a sample that may be, the whole part of share n + 1, at most
    n, evenly drawn. On the device, without waiting for it.

    Source: the count as in the code of Hu et al., 2020, arXiv 1905.12265.

    Args:
        offsets: int64 [B+1], see `lightspan.core.ragged`.
        seed_B: int64.
        may_N: bool.
    """
    owner_N = row_owners(offsets, len(may_N))
    place_N = torch.arange(len(may_N), device=offsets.device)
    drawn_N = hashed_uniform(mixed_seed(seed_B, 1)[owner_N] + place_N - offsets[owner_N], 0, (1,))[:, 0]
    rank_N = ragged_ranks(drawn_N + 2 * ~may_N, offsets)
    may_B = torch.zeros_like(offsets[1:]).index_add(0, owner_N, may_N.long())
    return may_N & (rank_N < (share * may_B.double() + 1 + 1e-9).floor()[owner_N])
