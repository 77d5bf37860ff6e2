"""How alike two sets of features of the same samples are, whatever their widths.

- Linear CKA: Kornblith, Norouzi, Lee, Hinton, "Similarity of Neural Network Representations Revisited", ICML 2019,
  arXiv 1905.00414: |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F) of centred features. It is biased: with fewer samples than
  features it tends to 1 for independent ones. The debiased one replaces each HSIC by the unbiased estimate of Song et
  al. (JMLR 13, 2012), as Nguyen, Raghu, Kornblith (arXiv 2010.15327) do; it can be below 0.
- Information imbalance: Glielmo, Zeni, Cheng, Csanyi, Laio, "Ranking the information content of distance measures",
  PNAS Nexus 1 (2022), arXiv 2104.15079: 2 / N times the mean rank that a point's nearest neighbour in A has among its
  neighbours in B. Near 0 A tells all that B does, at 1 nothing, and it is not symmetric.

Shapes: N samples, D and E features, Q samples per chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.spectra import centred
from lightspan.evaluation.rows import spaced_rows
from lightspan.evaluation.scale import scaled


def linear_cka(x_ND: Tensor, y_NE: Tensor, debiased: bool = True) -> float:
    """CKA, in [0, 1], at most 1 and perhaps below 0 if debiased.

    Raises: UserError for fewer than 4 samples if debiased or 2 if not, other numbers of them, features that are not
        finite, or all equal.
    """
    least = 4 if debiased else 2
    _require_pairs("CKA", x_ND, y_NE, least)
    x_ND, y_NE = (scaled(centred(scaled(features)[1][0]))[1][0] for features in (x_ND, y_NE))
    measure = _unbiased_hsic if debiased else _energy
    own = [measure(features, features) for features in (x_ND, y_NE)]
    if min(own) <= 0:
        which = "first" if own[0] <= 0 else "second"
        raise UserError(f"CKA: the {which} features hardly differ between samples, so there is nothing to compare")
    return measure(x_ND, y_NE) / (own[0] * own[1]) ** 0.5


def imbalance_ranks(a_ND: Tensor, b_NE: Tensor, neighbours: int = 1, chunk: int = 128) -> Tensor:
    """For each sample, the mean rank in b of its nearest neighbours in a, in [1, N - 1]: float64 [N].

    Its mean over samples, times 2 / N, is the information imbalance from a to b. Equal distances share their ranks, and
    neighbours that are equally far away in a count alike: without that, constant features would seem to tell what the
    order of the samples tells.

    Args:
        neighbours: of each sample; the paper takes 1.
        chunk: samples at a time; memory is some times chunk * N distances.
    Raises: UserError for fewer samples than neighbours + 2, other numbers of them, or features that are not finite.
    """
    _require_pairs("information imbalance", a_ND, b_NE, neighbours + 2)
    a_ND, b_NE = (scaled(features)[1][0] for features in (a_ND, b_NE))
    found = []
    for start in range(0, len(a_ND), chunk):
        in_a_QN, in_b_QN = (_distances(features, start, chunk) for features in (a_ND, b_NE))
        limit_Q1 = in_a_QN.kthvalue(neighbours, dim=1, keepdim=True).values
        nearer_QN, tied_QN = in_a_QN < limit_Q1, in_a_QN == limit_Q1
        left_Q1 = neighbours - nearer_QN.sum(dim=1, keepdim=True)
        weight_QN = nearer_QN + tied_QN * (left_Q1 / tied_QN.sum(dim=1, keepdim=True))
        sorted_QN = in_b_QN.sort(dim=1).values
        below_QN = torch.searchsorted(sorted_QN, in_b_QN)
        upto_QN = torch.searchsorted(sorted_QN, in_b_QN, right=True)
        rank_QN = (below_QN + upto_QN + 1) / 2
        found.append((weight_QN.double() * rank_QN).sum(dim=1) / neighbours)
    return torch.cat(found)


def _distances(x_ND: Tensor, start: int, chunk: int) -> Tensor:
    """Of a chunk of samples to all, that to itself infinite."""
    # Not by the matrix product: close neighbours far from the origin would drown in rounding errors.
    distance_QN = torch.cdist(x_ND[start : start + chunk], x_ND, compute_mode="donot_use_mm_for_euclid_dist")
    rows = torch.arange(len(distance_QN), device=distance_QN.device)
    distance_QN[rows, rows + start] = torch.inf
    return distance_QN


def _energy(x_ND: Tensor, y_NE: Tensor) -> float:
    """tr(X X^T Y Y^T), by whichever of both forms has fewer numbers."""
    if x_ND.shape[1] * y_NE.shape[1] <= len(x_ND) ** 2:
        return float((x_ND.T @ y_NE).square().sum())
    return float(((x_ND @ x_ND.T) * (y_NE @ y_NE.T)).sum())


def _unbiased_hsic(x_ND: Tensor, y_NE: Tensor) -> float:
    """n (n - 3) HSIC_1 of linear kernels, whose N x N matrices are not formed where features are fewer."""
    count = len(x_ND)
    own_x_N, own_y_N = x_ND.square().sum(dim=1), y_NE.square().sum(dim=1)
    row_x_N = x_ND @ x_ND.sum(dim=0) - own_x_N
    row_y_N = y_NE @ y_NE.sum(dim=0) - own_y_N
    trace = _energy(x_ND, y_NE) - float(own_x_N @ own_y_N)
    means = float(row_x_N.sum() * row_y_N.sum()) / ((count - 1) * (count - 2))
    return trace + means - 2 * float(row_x_N @ row_y_N) / (count - 2)


def _require_pairs(what: str, x_ND: Tensor, y_NE: Tensor, least: int) -> None:
    if len(x_ND) != len(y_NE):
        raise UserError(f"{what} compares features of the same samples, but got {len(x_ND)} and {len(y_NE)} of them")
    if len(x_ND) < least:
        raise UserError(f"{what} got {len(x_ND)} samples, but needs {least}")
    for features in (x_ND, y_NE):
        if not features.shape[1]:
            raise UserError(f"{what} got samples without features: {list(features.shape)}")
        if not features.isfinite().all():
            raise UserError(f"{what} got features that are NaN or infinite; the model has diverged")


@dataclass(frozen=True)
class Alignment(Result):
    """Linear CKA of two sets of features, see `lightspan.evaluation.geometry.similarity`."""

    debiased: float
    biased: float
    rows: int
    widths: tuple[int, ...]

    def figures(self) -> tuple[Figure, ...]:
        return (
            Figure("CKA, debiased", self.debiased),
            Figure("CKA, biased", self.biased),
            Figure("rows", self.rows),
            Figure("width of first", self.widths[0]),
            Figure("width of second", self.widths[1]),
        )


class CKA(Estimator):
    """Centred kernel alignment with linear kernels of two encoders' features of the same samples."""

    def fit(self, first: Features, second: Features) -> Alignment:
        """Raises: UserError for fewer than 4 samples, other samples in second, or features that are all equal."""
        require_same_samples("CKA", first, second)
        x_ND, y_NE = first.rows(), second.rows()
        return Alignment(
            debiased=linear_cka(x_ND, y_NE),
            biased=linear_cka(x_ND, y_NE, debiased=False),
            rows=len(x_ND),
            widths=(x_ND.shape[1], y_NE.shape[1]),
        )


@dataclass(frozen=True)
class Imbalance(Result):
    """Information imbalances of two sets of features, in (0, 2), and their standard errors as if samples were
    independent. `from_first` near 0: the first features tell which samples the second ones hold to be near.
    """

    from_first: float
    from_second: float
    from_first_error: float
    from_second_error: float
    rows: int

    def figures(self) -> tuple[Figure, ...]:
        return (
            Figure("imbalance from first to second", self.from_first),
            Figure("imbalance from second to first", self.from_second),
            Figure("standard error, from first", self.from_first_error),
            Figure("standard error, from second", self.from_second_error),
            Figure("rows", self.rows),
        )

    def draw(self, axes: Any) -> None:
        errors = {"xerr": self.from_first_error, "yerr": self.from_second_error}
        axes.errorbar([self.from_first], [self.from_second], **errors, fmt="o")
        axes.plot([0, 1], [0, 1], linewidth=0.8, color="grey")
        axes.set(xlabel="from first to second", ylabel="from second to first", xlim=(0, 1.05), ylim=(0, 1.05))


class InformationImbalance(Estimator):
    """Which of two encoders' features tell more about distances in the other ones.

    Args:
        neighbours: nearest neighbours of each sample; the paper takes 1.
        most: largest number of rows used, evenly spaced in the order of their index; the work grows with its square.
    """

    def __init__(self, neighbours: int = 1, most: int = 5000) -> None:
        if neighbours < 1:
            raise UserError(f"InformationImbalance neighbours={neighbours} must be at least 1")
        if most < neighbours + 2:
            raise UserError(f"InformationImbalance most={most} must be at least {neighbours + 2}: neighbours + 2")
        self.neighbours, self.most = neighbours, most

    def fit(self, first: Features, second: Features) -> Imbalance:
        """Raises: UserError for fewer samples than neighbours + 2, other samples in second, or features that are not
        finite.
        """
        require_same_samples("InformationImbalance", first, second)
        a_ND, b_NE = (spaced_rows(features.rows(), self.most) for features in (first, second))
        ranks = [imbalance_ranks(*pair, self.neighbours) for pair in ((a_ND, b_NE), (b_NE, a_ND))]
        half = len(a_ND) / 2
        means = [float(rank_N.mean()) / half for rank_N in ranks]
        errors = [float(rank_N.std()) / half / len(rank_N) ** 0.5 for rank_N in ranks]
        return Imbalance(means[0], means[1], errors[0], errors[1], rows=len(a_ND))


def require_same_samples(who: str, first: Features, second: Features) -> None:
    """Raises: UserError for two sets of other numbers of samples, or with other indices."""
    if len(first) != len(second):
        raise UserError(
            f"{who}: {len(first)} rows in first and {len(second)} in second; take both from the same samples"
        )
    if first.index_N is not None and second.index_N is not None and not torch.equal(first.index_N, second.index_N):
        raise UserError(f"{who}: first and second are of different samples (their indices differ)")
