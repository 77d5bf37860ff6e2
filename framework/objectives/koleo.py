"""Features spread out: the differential entropy of a batch, by distances of nearest neighbours.

Source: Sablayrolles et al., "Spreading vectors for similarity search", 2019, arXiv 1806.03198, eq. 4, as DINOv2 (arXiv
2304.07193) uses it. The neighbour is sought among the rows of all ranks, or as in DINOv3 (arXiv 2508.10104, section 3)
in groups of them, which are the same on any number of ranks; DINOv2's code looks on one rank alone.
Shapes: B rows of this rank, N rows of all ranks, D width.
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.distributed import all_reduce_sum, gather_rows
from lightspan.core.unit_length import unit_length

LEAST = 1e-8
"""Distances below it count as it, without a gradient: equal rows would have an infinite one."""


def koleo(x_BD: Tensor, group: int | None = None) -> Tensor:
    """-1/N sum_n log min_m |x_n - x_m| of rows at unit length, a scalar in float32 or wider.

    Args:
        group: rows of all ranks, in their order, among which a neighbour is sought, at least 2; the last ones of a
            batch may be fewer. None is all of them.
    Returns: a row without a neighbour, such as the only one of its group, adds 0.
    """
    with torch.autocast(x_BD.device.type, enabled=False):
        x_BD = unit_length(wide(x_BD))
        all_ND, start = gather_rows(x_BD)
        if len(all_ND) < 2:
            return 0 * all_ND.sum()
        with torch.no_grad():
            cosine_BN = x_BD @ all_ND.T
            own_B = torch.arange(start, start + len(x_BD), device=x_BD.device)
            cosine_BN.scatter_(1, own_B[:, None], -torch.inf)
            if group is not None:
                all_N = torch.arange(len(all_ND), device=x_BD.device)
                cosine_BN.masked_fill_((own_B // group)[:, None] != all_N // group, -torch.inf)
            largest_B, nearest_B = cosine_BN.max(dim=1)
        squared_B = (x_BD - all_ND[nearest_B]).square().sum(dim=1).masked_fill(largest_B == -torch.inf, 1)
        return all_reduce_sum(-0.5 * squared_B.clamp_min(LEAST**2).log().sum()) / len(all_ND)
