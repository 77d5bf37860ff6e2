"""Positions of two dense maps of features that are each other's most similar one.

Source: the local matching of Lu et al., "SelaVPR", ICLR 2024, arXiv 2402.14505, section 3.3, which needs no geometry.
Shapes: R pairs of pictures, P positions of the first, O of the other, E features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

AT_ONCE = 1 << 26
"""Similarities that are in memory at once, 256 MB."""


class Matches(NamedTuple):
    """other_RP: the position of the other picture that is most similar to each, int64.
    mutual_RP: whether that one's most similar position is this one, bool.
    """

    other_RP: Tensor
    mutual_RP: Tensor


@torch.no_grad()
def mutual_matches(a_RPE: Tensor, b_ROE: Tensor) -> Matches:
    """Of equal similarities the first counts, so that of two equal pictures without equal positions all match, and of a
    picture whose positions are all alike one. Half precision is widened only by the caller: in bfloat16 many are equal.
    """
    pairs, places = a_RPE.shape[:2]
    at_P = torch.arange(places, device=a_RPE.device)
    others, mutual = [at_P.new_zeros(0, places)], [at_P.new_zeros(0, places, dtype=torch.bool)]
    size = max(1, AT_ONCE // max(1, places * b_ROE.shape[1]))
    for some_a, some_b in zip(a_RPE.split(size), b_ROE.split(size), strict=True) if pairs else ():
        with torch.autocast(a_RPE.device.type, enabled=False):
            similar_RPO = some_a @ some_b.mT
        other_RP = similar_RPO.argmax(dim=2)
        others.append(other_RP)
        mutual.append(similar_RPO.argmax(dim=1).gather(1, other_RP) == at_P)
    return Matches(torch.cat(others), torch.cat(mutual))


def match_scores(a_RPE: Tensor, b_ROE: Tensor) -> tuple[Tensor, Tensor]:
    """(mean cosine over the mutual matches [R], how many there are, int64 [R]) of features of unit length.

    The mean has gradients, the choice of matches none. There is at least one match, the most similar pair of all, but
    where features are NaN: the mean is then 0.
    """
    other_RP, mutual_RP = mutual_matches(a_RPE, b_ROE)
    chosen_RPE = b_ROE.gather(1, other_RP[..., None].expand(-1, -1, b_ROE.shape[2]))
    cosine_RP = (a_RPE * chosen_RPE).sum(dim=2)
    count_R = mutual_RP.sum(dim=1)
    return cosine_RP.where(mutual_RP, 0).sum(dim=1) / count_R.clamp_min(1), count_R
