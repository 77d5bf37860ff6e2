"""Nearest-neighbour classification on frozen features: a probe without anything to tune.

Source: Wu, Xiong, Yu, Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (CVPR 2018,
arXiv 1805.01978), section 3.4. Shapes: N bank rows, M query rows, D features, K neighbours, C classes, E values, Q
rows per chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightspan.core.devices import wide_type
from lightspan.core.errors import UserError
from lightspan.evaluation.labels import kind_of, require_labels
from lightspan.evaluation.probes.probe_scores import probe_scores
from lightspan.evaluation.rows import unit_rows


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
    require_labels("knn", query_MD, query_labels_M)
    found_M = knn_classes(bank_ND, bank_labels_N, query_MD, k, temperature, chunk)
    return int((found_M == query_labels_M).sum()) / len(query_MD)


def knn_classes(
    bank_ND: Tensor,
    bank_labels_N: Tensor,
    query_MD: Tensor,
    k: int = 20,
    temperature: float | None = 0.07,
    chunk: int = 1024,
) -> Tensor:
    """The class that `knn_accuracy` compares with each query's own, int64 [M]. Arguments and errors are those."""
    require_labels("knn", bank_ND, bank_labels_N)
    class_C, bank_class_N = bank_labels_N.unique(return_inverse=True)  # only a class of the bank can win
    found = []
    for weight_QK, neighbour_QK in _neighbours(bank_ND, query_MD, k, temperature, chunk):
        votes_QC = torch.zeros(len(weight_QK), len(class_C), dtype=weight_QK.dtype, device=weight_QK.device)
        votes_QC.scatter_add_(1, bank_class_N[neighbour_QK], weight_QK)
        found.append(class_C[votes_QC.argmax(dim=1)])
    return torch.cat(found)


def knn_mean(
    bank_ND: Tensor,
    bank_values_NE: Tensor,
    query_MD: Tensor,
    k: int = 20,
    temperature: float | None = 0.07,
    chunk: int = 1024,
) -> Tensor:
    """Mean of the values of the k nearest bank rows, weighted like the votes of `knn_accuracy`: [M E], float64.

    Args:
        bank_values_NE: what is known of each bank row: numbers, or tags as 0 and 1.
    Raises: UserError as `knn_accuracy`, and for values that are not finite or not a row for each of the bank's.
    """
    if bank_values_NE.ndim != 2 or len(bank_values_NE) != len(bank_ND) or not bank_values_NE.isfinite().all():
        raise UserError(
            f"knn got values {list(bank_values_NE.shape)} for {len(bank_ND)} rows; give each row finite numbers [N, E]"
        )
    values_NE = bank_values_NE.double()
    means = []
    for weight_QK, neighbour_QK in _neighbours(bank_ND, query_MD, k, temperature, chunk):
        share_QK = weight_QK.double() / weight_QK.double().sum(dim=1, keepdim=True)
        means.append(torch.einsum("qk,qke->qe", share_QK, values_NE[neighbour_QK]))
    return torch.cat(means)


def euclidean_knn_scores(
    bank_ND: Tensor, known: Tensor, query_MD: Tensor, asked: Tensor, k: int = 5, chunk: int = 1024
) -> dict[str, float]:
    """`lightspan.evaluation.probes.probe_scores` of the k nearest bank rows by Euclidean distance, with equal votes.

    Like scikit-learn's KNeighborsClassifier: of classes with equal votes the smallest wins; of tags and numbers, the
    neighbours' mean counts. Distances are computed in float64, about the bank's mean.

    Args:
        known, asked: labels of the bank's and the query's rows, of one kind (`lightspan.evaluation.labels.kind_of`).
        k, chunk: as in `knn_accuracy`.
    Raises: UserError as `knn_accuracy` and `probe_scores`.
    """
    _require_neighbours(bank_ND, query_MD, k)
    classes = kind_of(known) == "classes"
    values_NE = known.double().view(len(known), -1)
    if classes:
        require_labels("knn", bank_ND, known)
        require_labels("knn", query_MD, asked)
        values_NE = torch.nn.functional.one_hot(known, 1 + int(known.max())).double()
    bank_ND, query_MD = bank_ND.double(), query_MD.double()
    origin_D = bank_ND.mean(dim=0)
    bank_ND, query_MD = bank_ND - origin_D, query_MD - origin_D
    half_N = bank_ND.square().sum(dim=1) / 2
    means = []
    for query_QD in query_MD.split(chunk):
        nearest_QK = (query_QD @ bank_ND.T - half_N).topk(k).indices
        means.append(values_NE[nearest_QK].mean(dim=1))
    return probe_scores(torch.cat(means), asked)


def recall_at_one(x_ND: Tensor, label_N: Tensor, chunk: int = 1024) -> float:
    """Share of rows whose nearest other row by cosine is of their class, in [0, 1]: retrieval among themselves.

    Raises: UserError for fewer than two rows, and as `knn_accuracy`.
    """
    require_labels("recall", x_ND, label_N)
    if len(x_ND) < 2:
        raise UserError(f"recall of {len(x_ND)} row: none has another one to find; give at least two")
    at_N, correct = torch.arange(len(x_ND), device=x_ND.device), 0
    for (_, neighbour_Q2), at_Q in zip(_neighbours(x_ND, x_ND, 2, None, chunk), at_N.split(chunk), strict=True):
        # A row is its own nearest one, unless another one is equal to it, which may come first.
        other_Q = torch.where(neighbour_Q2[:, 0] == at_Q, neighbour_Q2[:, 1], neighbour_Q2[:, 0])
        correct += int((label_N[other_Q] == label_N[at_Q]).sum())
    return correct / len(x_ND)


def _neighbours(
    bank_ND: Tensor, query_MD: Tensor, k: int, temperature: float | None, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(weights, bank rows), both [Q K], of each chunk of queries; checked when the first one is taken."""
    _require_neighbours(bank_ND, query_MD, k)
    if temperature is not None and temperature <= 0:
        raise UserError(f"knn temperature={temperature} must be above 0, or null for equal votes")
    wide = wide_type(bank_ND.dtype, query_MD.dtype)
    bank_ND, query_MD = unit_rows(bank_ND.to(wide)), unit_rows(query_MD.to(wide))
    for query_QD in query_MD.split(chunk):
        similarity_QK, neighbour_QK = (query_QD @ bank_ND.T).topk(k)
        # Relative to the nearest one: the same votes, without overflow at a small temperature.
        nearness_QK = similarity_QK - similarity_QK[:, :1]
        yield torch.ones_like(nearness_QK) if temperature is None else (nearness_QK / temperature).exp(), neighbour_QK


def _require_neighbours(bank_ND: Tensor, query_MD: Tensor, k: int) -> None:
    if not 1 <= k <= len(bank_ND):
        raise UserError(f"knn k={k} is outside [1, {len(bank_ND)}], the rows in the bank; lower k or use a larger bank")
    if not len(query_MD):
        raise UserError("knn got no query rows; give it at least one validation sample")
    if not (bank_ND.isfinite().all() and query_MD.isfinite().all()):
        raise UserError("features contain NaN or infinite values, so they have no neighbours; the model has diverged")
