"""Recall at k as the recognition of places counts it: whether any of the first k pictures shows the place.

Source: the protocol of Arandjelovic et al., "NetVLAD", CVPR 2016, arXiv 1511.07247, section 5.1. It is not the share of
what is sought that is found, which `lightspan.evaluation.scores.recall_at_k` has.
Shapes: Q queries, G pictures of a database, D features, K of them that are nearest.
"""

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.dense.retrieval import STEP
from lightspan.evaluation.rows import unit_rows


def nearest_first(query_QD: Tensor, gallery_GD: Tensor, match_QG: Tensor, k: int) -> Tensor:
    """The k nearest pictures by cosine, int64 [Q K], nearest first; all if there are fewer.

    Of equal cosines, those that do not match come first: features that are all alike find nothing by the order of rows.

    Raises: UserError for features that are not finite.
    """
    if not query_QD.isfinite().all() or not gallery_GD.isfinite().all():
        raise UserError("features contain NaN or infinite values, so no place can be found; the model has diverged")
    cosine_QG = (unit_rows(query_QD.double()) @ unit_rows(gallery_GD.double()).T / STEP).round()
    return first_others(cosine_QG, match_QG)[:, :k]


def first_others(score_QG: Tensor, match_QG: Tensor) -> Tensor:
    """Places of the scores from the highest down, int64 [Q G]; of equal ones those that do not match come first."""
    others_first = match_QG.to(torch.uint8).argsort(dim=1, stable=True)
    order = score_QG.gather(1, others_first).argsort(dim=1, descending=True, stable=True)
    return others_first.gather(1, order)


def place_recall(order_QK: Tensor, match_QG: Tensor, k: int) -> float:
    """Share of the queries with any match at all that have one among their first k; NaN without such a query."""
    sought_Q = match_QG.any(dim=1)
    found_Q = match_QG.gather(1, order_QK[:, :k]).any(dim=1)
    return float(found_Q[sought_Q].double().mean())
