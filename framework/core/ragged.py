"""Samples of any numbers of rows, packed: the rows of all, one after another, cut by offsets.

`offsets` are int64 [B+1]: sample i has the rows from offsets[i] up to offsets[i + 1] (`lightspan.core.batches`).
Shapes: N rows of all samples, B samples, D numbers of a row, M rows of the largest sample.
"""

import torch
from torch import Tensor

from lightspan.core.devices import has_values, wide


def row_owners(offsets: Tensor, rows: int) -> Tensor:
    """The number of the sample to which each of `rows` packed rows belongs, int64 [N], without waiting for a device."""
    return torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff(), output_size=rows)


def kept_offsets(kept_N: Tensor, offsets: Tensor) -> Tensor:
    """The offsets of the rows that are kept, int64 [B+1].

    Args:
        kept_N: bool.
    """
    counts_B = torch.zeros_like(offsets[1:]).index_add(0, row_owners(offsets, len(kept_N)), kept_N.long())
    return torch.cat([offsets[:1], counts_B.cumsum(0)])


def ragged_ranks(x_N: Tensor, offsets: Tensor) -> Tensor:
    """How many rows of its sample are before each, in ascending order, int64 [N]; of equal ones the first is first."""
    owner_N = row_owners(offsets, len(x_N))
    order_N = x_N.sort(stable=True).indices
    order_N = order_N[owner_N[order_N].sort(stable=True).indices]
    place_N = torch.arange(len(x_N), device=x_N.device) - offsets[owner_N]
    return torch.empty_like(order_N).scatter(0, order_N, place_N)


def ragged_means(x_ND: Tensor, offsets: Tensor) -> Tensor:
    """The mean over the rows of each sample, [B D] in the type of x; 0, with gradient 0, of an empty one. Sums are made
    in float32 or wider: in half types those of many rows overflow, or stop growing.
    """
    given_ND = wide(x_ND)
    sums_BD = given_ND.new_zeros(len(offsets) - 1, x_ND.shape[1]).index_add(0, row_owners(offsets, len(x_ND)), given_ND)
    return (sums_BD / offsets.diff().clamp_min(1)[:, None]).to(x_ND.dtype)


def ragged_maxima(x_ND: Tensor, offsets: Tensor) -> Tensor:
    """The largest of each column over the rows of each sample, [B D] in the type of x; 0, with gradient 0, of an empty
    one. Rows that are equally large share the gradient.
    """
    empty_BD = x_ND.new_zeros(len(offsets) - 1, x_ND.shape[1])
    at_ND = row_owners(offsets, len(x_ND))[:, None].expand_as(x_ND)
    return empty_BD.scatter_reduce(0, at_ND, x_ND, "amax", include_self=False)


def padded(x_ND: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """[B M D], each sample's rows and then zeros, and which rows are a sample's, bool [B M]. M is at least 1.

    M is read on the host, for which the device is waited for.
    """
    counts_B = offsets.diff()
    if has_values(counts_B):
        most = max(int(counts_B.max()), 1) if len(counts_B) else 1
    else:  # a plan, whose samples are of one size
        most = max(-(-len(x_ND) // max(len(counts_B), 1)), 1)
    real_BM = torch.arange(most, device=x_ND.device) < counts_B[:, None]
    x_BMD = x_ND.new_zeros(len(counts_B), most, *x_ND.shape[1:])
    owner_N = row_owners(offsets, len(x_ND))
    place_N = torch.arange(len(x_ND), device=x_ND.device) - offsets[owner_N]
    return x_BMD.index_put((owner_N, place_N), x_ND), real_BM
