"""Nearest-neighbour classification on frozen features: a probe without anything to tune.

Source: Wu, Xiong, Yu, Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (CVPR 2018,
arXiv 1805.01978), section 3.4. Shapes: N bank rows, M query rows, D features, K neighbours, C classes, Q rows per
chunk.
"""

import torch
from torch import Tensor

from lightspan.analysis.labels import require_labels
from lightspan.analysis.rows import unit_rows
from lightspan.devices import wide_type
from lightspan.errors import UserError


def knn_accuracy(
    bank_ND: Tensor,
    bank_labels_N: Tensor,
    query_MD: Tensor,
    query_labels_M: Tensor,
    k: int = 20,
    temperature: float | None = 0.07,
    chunk: int = 1024,
) -> float:
    """Share of queries whose class is the one that their k nearest bank rows by cosine vote for, in [0, 1].

    A neighbour of similarity s votes with exp(s / temperature) as in Wu et al., with 1 if temperature is None. Of
    classes with equal votes the smallest wins. Similarities are computed in float32 at least.

    Args:
        bank_ND, query_MD: features, any scale and dtype; a row of zeros is equally far from everything.
        bank_labels_N, query_labels_M: int64, >= 0, in any numbering: memory grows with the classes that occur.
        k: neighbours, in [1, N].
        temperature: > 0, or None for equal votes.
        chunk: queries at a time; memory is chunk * N similarities. The result does not depend on it.
    Raises: UserError for k or temperature out of range, features that are not finite, no query, or labels that are
            not one whole number from 0 for each row.
    """
    if not 1 <= k <= len(bank_ND):
        raise UserError(f"knn k={k} is outside [1, {len(bank_ND)}], the rows in the bank; lower k or use a larger bank")
    if temperature is not None and temperature <= 0:
        raise UserError(f"knn temperature={temperature} must be above 0, or null for equal votes")
    if not len(query_MD):
        raise UserError("knn got no query rows; give it at least one validation sample")
    require_labels("knn", bank_ND, bank_labels_N)
    require_labels("knn", query_MD, query_labels_M)
    if not (bank_ND.isfinite().all() and query_MD.isfinite().all()):
        raise UserError("features contain NaN or infinite values, so they have no neighbours; the model has diverged")
    wide = wide_type(bank_ND.dtype, query_MD.dtype)
    bank_ND, query_MD = (unit_rows(x.to(wide)) for x in (bank_ND, query_MD))
    class_C, bank_class_N = bank_labels_N.unique(return_inverse=True)  # only a class of the bank can win
    correct = 0
    for query_QD, labels_Q in zip(query_MD.split(chunk), query_labels_M.split(chunk), strict=True):
        similarity_QK, neighbour_QK = (query_QD @ bank_ND.T).topk(k)
        # Relative to the nearest one: the same votes, without overflow at a small temperature.
        nearness_QK = similarity_QK - similarity_QK[:, :1]
        weight_QK = torch.ones_like(nearness_QK) if temperature is None else (nearness_QK / temperature).exp()
        votes_QC = torch.zeros(len(query_QD), len(class_C), dtype=weight_QK.dtype, device=weight_QK.device)
        votes_QC.scatter_add_(1, bank_class_N[neighbour_QK], weight_QK)
        correct += int((class_C[votes_QC.argmax(dim=1)] == labels_Q).sum())
    return correct / len(query_MD)
