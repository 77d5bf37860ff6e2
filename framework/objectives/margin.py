"""Losses with a margin. On pairs: rows of one class within a distance of one another, rows of two classes beyond it. On
rankings: one score above another.

Source of the first: Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017, arXiv 1706.07567, equation 4,
with the choice of negatives of ADSL's code (arXiv 2206.09068), the hardest beyond a cutoff, not drawn by distance, and
its constant boundary, which Wu et al. learn.
Shapes: B anchors of this rank, N rows of all ranks, D embedding width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.core.distributed import all_reduce_sums, gather_rows
from lightspan.objectives.info_nce import own_rows
from lightspan.objectives.means import mean_of

LEAST_SQUARE = 1e-8
"""Added to squared distances: the root of zero has no slope."""


def margin_loss(
    z_BD: Tensor,
    label_B: Tensor,
    cluster_B: Tensor,
    boundary: float = 1.2,
    margin: float = 0.2,
    cutoff: float = 0.5,
) -> Tensor:
    """Mean over the terms above zero of relu(d_ap - boundary + margin) and relu(boundary - d_an + margin).

    Pairs are formed within a cluster only. An anchor has each other row of its class as a positive, and as many
    negatives as positives: the nearest rows of other classes with d_an >= cutoff, fewer if there are no more of them.
    Rows are those of all ranks, with gradients. Without any pair, or if all pairs are where they belong, the loss is 0.

    Args:
        z_BD: embeddings, compared as they are: of unit length, distances lie in [0, 2]. Ranks may differ in B. Half
            precision is widened to float32, also under autocast.
        label_B, cluster_B: int64.
        boundary, margin, cutoff: distances >= 0.
    Returns: scalar >= 0, the same on all ranks.
    """
    z_ND, first = gather_rows(wide(z_BD))
    label_N, cluster_N = gather_rows(torch.stack([label_B, cluster_B], dim=1))[0].unbind(dim=1)
    distance_BN = _distances(wide(z_BD), z_ND)
    near_BN = cluster_B[:, None] == cluster_N
    same_BN = label_B[:, None] == label_N
    positive_BN = near_BN & same_BN & ~own_rows(len(z_BD), first, z_ND)
    eligible_BN = near_BN & ~same_BN & (distance_BN >= cutoff)
    order_BN = distance_BN.detach().where(eligible_BN, torch.inf).argsort(dim=1).argsort(dim=1)
    negative_BN = eligible_BN & (order_BN < positive_BN.sum(dim=1, keepdim=True))
    too_far_BN = (distance_BN - boundary + margin).relu().where(positive_BN, 0)
    too_near_BN = (boundary - distance_BN + margin).relu().where(negative_BN, 0)
    active = ((too_far_BN > 0).sum() + (too_near_BN > 0).sum()).to(z_ND.dtype)
    total, count = all_reduce_sums(too_far_BN.sum() + too_near_BN.sum(), active)
    return total / count.detach().clamp_min(1)


def _distances(z_BD: Tensor, z_ND: Tensor) -> Tensor:
    """Euclidean, [B N], by a product of matrices: no memory of [B N D]."""
    with torch.autocast(z_BD.device.type, enabled=False):
        squares_BN = z_BD.square().sum(dim=1, keepdim=True) + z_ND.square().sum(dim=1) - 2 * z_BD @ z_ND.T
    return (squares_BN.clamp_min(0) + LEAST_SQUARE).sqrt()


def ranking_loss(higher_B: Tensor, lower_B: Tensor, margin: float) -> Tensor:
    """Mean over the rows of all ranks of relu(margin - (higher - lower)): 0 where every `higher` exceeds its `lower` by
    `margin`, and without rows.
    """
    higher_B, lower_B = wide(higher_B), wide(lower_B)
    total = F.margin_ranking_loss(higher_B, lower_B, torch.ones_like(lower_B), margin=margin, reduction="sum")
    return mean_of(total, higher_B.numel())
