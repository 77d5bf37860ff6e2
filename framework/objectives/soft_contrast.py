"""Soft contrast: two images are to be as similar as the sets of tags that hold of them.

Source: Wang, Albrecht, Zhu, "Multi-Label Guided Soft Contrastive Learning for Efficient Earth Observation Pretraining"
(SoftCon), 2024, arXiv 2405.20462: beside the InfoNCE of an image with itself, the similarities of all pairs of a batch
are fitted to those of their multi-hot labels, S_ij = cos(y_i, y_j), by a binary cross-entropy. How a cosine becomes a
probability is not published; here it is sigmoid(cos / T), with the temperature of the InfoNCE, whose gradient is at
most 1 / T where (1 + cos) / 2 would have infinite ones at opposite and at equal rows.
Shapes: B images of this rank, N of all ranks, D embedding width, G tags.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.distributed import gather_rows
from lightspan.core.ranges import require_temperatures
from lightspan.objectives.info_nce import gated_cosine, own_rows, soft_info_nce, unit
from lightspan.objectives.means import known_mean


class SoftContrast(NamedTuple):
    """Scalars in nats, the same on all ranks: `instance`, of an image with itself, and `soft`, of all pairs."""

    instance: Tensor
    soft: Tensor


def tag_similarity(hold_BG: Tensor, hold_NG: Tensor) -> Tensor:
    """S, cosines of multi-hot rows, float32 [B N] in [0, 1]: tags of both over the root of either's number of tags.

    Args:
        hold_BG, hold_NG: bool. A row without any tag has similarity 0 with every row, itself as well.
    """
    return (unit(hold_BG.float()) @ unit(hold_NG.float()).T).clamp(max=1)


def soft_contrast(query_BD: Tensor, key_BD: Tensor, hold_BG: Tensor, temperature: float | Tensor = 0.2) -> SoftContrast:
    """Queries against the keys of all ranks, to which gradients flow if they require them.

    An image of which no tag holds is a negative of the others in the first term, and has no part in the second, which
    is 0 if there is no pair with tags.

    Args:
        query_BD, key_BD: row i of both comes from image i; lengths do not matter, and ranks may differ in B.
        hold_BG: bool, the tags that hold of each image.
        temperature: T > 0.
    Raises: UserError for a temperature of 0 or less or infinity, if it is no tensor.
    """
    require_temperatures(temperature=temperature)
    key_ND, first = gather_rows(key_BD)
    hold_NG = gather_rows(hold_BG.long())[0] > 0
    logits_BN = gated_cosine(query_BD, key_ND) / temperature
    instance = soft_info_nce(logits_BN, own_rows(len(query_BD), first, key_ND))
    with torch.autocast(query_BD.device.type, enabled=False):
        similarity_BN = tag_similarity(hold_BG, hold_NG).to(logits_BN.dtype)
        nats_BN = F.binary_cross_entropy_with_logits(logits_BN, similarity_BN, reduction="none")
    return SoftContrast(instance, known_mean(nats_BN, hold_BG.any(dim=1)[:, None] & hold_NG.any(dim=1)))
