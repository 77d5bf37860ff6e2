"""k-means on the sphere, over the rows of all ranks.

Source: Dhillon, Modha, "Concept decompositions for large sparse text data using clustering", 2001; Caron et al.,
"SwAV", 2020, arXiv 2006.09882, appendix (DeepCluster-v2).
Shapes: M rows of this rank, N rows of all ranks, K centroids, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.distributed import all_reduce_sum, all_reduce_sums, gather_rows
from lightspan.core.errors import UserError


class Clusters(NamedTuple):
    """Centroids of unit length, the same on all ranks, and the nearest one of each row of this rank, int64."""

    centroid_KD: Tensor
    nearest_M: Tensor
    objective: Tensor


@torch.no_grad()
def spherical_kmeans(rows_MD: Tensor, start_KD: Tensor, steps: int = 10) -> Clusters:
    """Lloyd's steps: each row goes to the centroid of largest cosine, each centroid to the direction of its rows' sum.

    The objective, the sum of cosines of all rows with their centroids, never falls. A centroid without rows, or whose
    rows sum to zero, stays where it is. Rows of zeros belong to the first centroid and have no say.

    Args:
        rows_MD: scaled to unit length here; ranks may have different numbers of them, or none.
        start_KD: centroids to start from, the same on all ranks.
        steps: >= 0; at 0 rows are assigned to the start.
    """
    unit_MD, centroid_KD = F.normalize(rows_MD, dim=1), F.normalize(start_KD, dim=1)
    for _ in range(steps):
        nearest_M = (unit_MD @ centroid_KD.T).argmax(dim=1)
        sum_KD = torch.zeros_like(centroid_KD).index_add_(0, nearest_M, unit_MD)
        (sum_KD,) = all_reduce_sums(sum_KD)
        length_K1 = sum_KD.norm(dim=1, keepdim=True)
        centroid_KD = torch.where(
            length_K1 > 0, sum_KD / length_K1.clamp_min(torch.finfo(sum_KD.dtype).tiny), centroid_KD
        )
    cosine_M, nearest_M = (unit_MD @ centroid_KD.T).max(dim=1)
    (objective,) = all_reduce_sums(cosine_M.sum())
    return Clusters(centroid_KD, nearest_M, objective)


def drawn_rows(rows_MD: Tensor, order_M: Tensor, count: int, seed: int) -> Tensor:
    """`count` different rows of all ranks, drawn by the seed: where k-means starts. [count D], the same on all ranks.

    Args:
        order_M: a number for each row, such as its image's, different among all ranks: whichever rank has a row, the
            same ones are drawn.
    Raises: UserError if there are fewer rows.
    """
    order_N, first = gather_rows(order_M)
    if len(order_N) < count:
        raise UserError(
            f"k-means of {count} clusters needs as many rows, and there are {len(order_N)}; take fewer clusters"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen_K = order_N.argsort()[torch.randperm(len(order_N), generator=generator)[:count].to(order_N.device)] - first
    own_K = (chosen_K >= 0) & (chosen_K < len(rows_MD))
    drawn_KD = rows_MD.new_zeros(count, rows_MD.shape[1])
    drawn_KD[own_K] = rows_MD[chosen_K[own_K]]
    return all_reduce_sum(drawn_KD)  # each row comes from one rank
