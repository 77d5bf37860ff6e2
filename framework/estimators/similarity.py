"""How alike the features of two encoders are on the same samples."""

from dataclasses import dataclass
from typing import Any

import torch

from lightspan.analysis.rows import spaced_rows
from lightspan.analysis.similarity import imbalance_ranks, linear_cka
from lightspan.errors import UserError
from lightspan.estimators.estimator import Estimator
from lightspan.features.features import Features
from lightspan.results import Figure, Result


@dataclass(frozen=True)
class Alignment(Result):
    """Linear CKA of two sets of features, see `lightspan.analysis.similarity`."""

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
        _require_same_samples("CKA", first, second)
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
        _require_same_samples("InformationImbalance", first, second)
        a_ND, b_NE = (spaced_rows(features.rows(), self.most) for features in (first, second))
        ranks = [imbalance_ranks(*pair, self.neighbours) for pair in ((a_ND, b_NE), (b_NE, a_ND))]
        half = len(a_ND) / 2
        means = [float(rank_N.mean()) / half for rank_N in ranks]
        errors = [float(rank_N.std()) / half / len(rank_N) ** 0.5 for rank_N in ranks]
        return Imbalance(means[0], means[1], errors[0], errors[1], rows=len(a_ND))


def _require_same_samples(who: str, first: Features, second: Features) -> None:
    if len(first) != len(second):
        raise UserError(
            f"{who}: {len(first)} rows in first and {len(second)} in second; take both from the same samples"
        )
    if first.index_N is not None and second.index_N is not None and not torch.equal(first.index_N, second.index_N):
        raise UserError(f"{who}: first and second are of different samples (their indices differ)")
