"""Losses of where a crop is: how alike crops are, compared with how much of one lies in the other.

Source: Wu et al., "VoCo", CVPR 2024, arXiv 2402.17300 (its L_pred and L_reg); Wu et al., "Large-Scale 3D Medical Image
Pre-training with Geometric Context Priors", 2024, arXiv 2410.09890.
Shapes: B volumes of this rank, M crops at random places, K base crops, D width.
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.unit_length import unit_length
from lightspan.objectives.means import mean

LEAST = 1e-6
"""What is left at a distance of 1, whose logarithm would be infinite: the official code's."""


def positive_cosines(crops_BMD: Tensor, bases_BKD: Tensor) -> Tensor:
    """max(0, cos) of each crop with each base crop of its volume, [B M K] in float32 or wider; 0 of a row of zeros."""
    with torch.autocast(crops_BMD.device.type, enabled=False):
        return (unit_length(wide(crops_BMD)) @ unit_length(wide(bases_BKD)).mT).relu()


def surprise(distance: Tensor) -> Tensor:
    """-log(1 - d) for d in [0, 1], 0 at 0 and at most -log(`LEAST`)."""
    return -(1 - (1 - LEAST) * distance).log()


def overlap_loss(overlap_BMK: Tensor, similarity_BMK: Tensor) -> Tensor:
    """-log(1 - |y - s|), mean over base crops, crops and the volumes of all ranks: VoCo's L_pred, a scalar, 0 where all
    agree.

    Args:
        overlap_BMK: y, the share of a crop that lies in a base crop, in [0, 1].
        similarity_BMK: s, in [0, 1].
    """
    return mean(surprise((overlap_BMK - similarity_BMK).abs()))


def split_overlap_loss(overlap_BMK: Tensor, similarity_BMK: Tensor) -> Tensor:
    """`overlap_loss` in two parts with a mean of their own, since most overlaps are 0: where y > 0 weighted by y, and
    where y is 0. A volume in which either does not occur has 0 there. The sum, mean over the volumes of all ranks.

    Source: the official code of VoCo-L.
    """
    surprise_BMK = surprise((overlap_BMK - similarity_BMK).abs())
    apart_BMK = (overlap_BMK == 0).to(surprise_BMK.dtype)
    parts = (_weighted(surprise_BMK, weight) for weight in (overlap_BMK, apart_BMK))
    return mean(sum(parts, torch.zeros_like(surprise_BMK[:, 0, 0])))


def base_similarities(bases_BKD: Tensor, others_BKD: Tensor) -> Tensor:
    """max(0, cos) of each pair i < j of base crops, the second one of the others: [B P], P = K (K - 1) / 2, none of a
    single base crop. Their mean is VoCo's L_reg.
    """
    count = bases_BKD.shape[1]
    first_P, second_P = torch.triu_indices(count, count, offset=1, device=bases_BKD.device)
    return positive_cosines(bases_BKD, others_BKD)[:, first_P, second_P]


def _weighted(x_BMK: Tensor, weight_BMK: Tensor) -> Tensor:
    """The mean of each volume by weights >= 0, [B]; 0 where all weights are."""
    total_B = weight_BMK.sum(dim=(1, 2))
    return (x_BMK * weight_BMK).sum(dim=(1, 2)) / total_B.masked_fill(total_B == 0, 1)
