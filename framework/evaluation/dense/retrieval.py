"""Finding what belongs to a query among other rows: average precision and rank 1, with rows that do not count.

Source: the protocol of person re-identification: Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV
2015 (Market-1501). Rows of the query's own identity and camera are junk: to find them again takes no more than the
scene. They are taken out of the list before it is scored, and so is whoever has no identity (there -1).
Shapes: Q queries, G rows of a gallery, D features.
"""

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.rows import unit_rows

STEP = 2.0**-20
"""Cosines are compared in multiples of it: equal rows differ by rounding, and must not be told apart by it."""
CHUNK = 1 << 22
"""Pairs that are sorted at once."""


def across_cameras(identity_Q: Tensor, camera_Q: Tensor, identity_G: Tensor, camera_G: Tensor) -> tuple[Tensor, Tensor]:
    """(match, junk), bool [Q G]: what a query looks for, the same identity before another camera, and what is left out,
    the same identity before the same camera, or a row without identity (below 0). A query without one has no match.
    """
    same = (identity_Q[:, None] == identity_G) & (identity_Q >= 0)[:, None]
    before_same = camera_Q[:, None] == camera_G
    return same & ~before_same, (same & before_same) | (identity_G < 0)


def retrieved(query_QD: Tensor, gallery_GD: Tensor, match_QG: Tensor, junk_QG: Tensor) -> tuple[Tensor, Tensor]:
    """(average precision, rank 1) of each query, float64 [Q] in [0, 1]; NaN for one without a match.

    Rows of the gallery are sorted by cosine, junk left out. Of equal cosines, those of others come first, so that
    features that are all alike find nothing by the order of the rows. Average precision is the mean, over a query's
    matches, of the share of matches up to there; rank 1 is 1 if the first row matches.

    Raises: UserError for features that are not finite.
    """
    if not query_QD.isfinite().all() or not gallery_GD.isfinite().all():
        raise UserError("features contain NaN or infinite values, so nothing can be retrieved; the model has diverged")
    query_QD, gallery_GD = unit_rows(query_QD.double()), unit_rows(gallery_GD.double())
    places_G = torch.arange(1, len(gallery_GD) + 1, dtype=torch.float64, device=gallery_GD.device)
    found = [query_QD.new_zeros(2, 0)]
    size = max(1, CHUNK // max(1, len(gallery_GD)))
    for query_BD, match_BG, junk_BG in zip(
        query_QD.split(size), match_QG.split(size), junk_QG.split(size), strict=True
    ):
        if not len(query_BD):
            continue
        others_first = match_BG.to(torch.uint8).argsort(dim=1, stable=True)
        cosine_BG = (query_BD @ gallery_GD.T / STEP).round().masked_fill(junk_BG, -torch.inf)
        order = cosine_BG.gather(1, others_first).argsort(dim=1, descending=True, stable=True)
        hit_BG = match_BG.gather(1, others_first.gather(1, order)).double()
        matches_B = hit_BG.sum(dim=1)
        precision_B = (hit_BG * hit_BG.cumsum(dim=1) / places_G).sum(dim=1) / matches_B
        first_B = hit_BG[:, :1].sum(dim=1).where(matches_B > 0, torch.nan)
        found.append(torch.stack([precision_B, first_B]))
    precision_Q, first_Q = torch.cat(found, dim=1)
    return precision_Q, first_Q
