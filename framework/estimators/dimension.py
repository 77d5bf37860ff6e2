"""How many dimensions features use: that of the manifold that they lie on, and that of the space that they span."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightspan.analysis.dimension import fitted_dimension, likeliest_dimension, neighbour_ratios
from lightspan.analysis.rows import spaced_rows
from lightspan.analysis.spectra import (
    effective_rank,
    energy_shares,
    gram_singular_values,
    participation_ratio,
    stable_rank,
)
from lightspan.drawing import COLOURS
from lightspan.errors import UserError
from lightspan.estimators.estimator import Estimator
from lightspan.features.features import Features
from lightspan.results import Figure, Result


@dataclass(frozen=True)
class Dimension(Result):
    """A manifold's dimension; `ratios` are quantiles of r2 / r1, the first at share 1 / (len + 1)."""

    dimension: float
    relative_error: float
    points: int
    ratios: tuple[float, ...]

    def figures(self) -> tuple[Figure, ...]:
        return (
            Figure("dimension", self.dimension),
            Figure("relative standard error", self.relative_error),
            Figure("different points", self.points),
        )

    def draw(self, axes: Any) -> None:
        import numpy as np

        x = np.log(self.ratios)
        share = np.arange(1, len(x) + 1) / (len(x) + 1)
        axes.plot(x, -np.log1p(-share), "o", color=COLOURS[0], markersize=3, label="points")
        axes.plot(x, self.dimension * x, color=COLOURS[1], linewidth=1.5, label=f"slope {self.dimension:.3g}")
        axes.set(xlabel="log(r2 / r1)", ylabel="-log(1 - share below)")
        axes.legend(frameon=False)


class TwoNN(Estimator):
    """The dimension of the manifold that features lie on, by `lightspan.analysis.dimension`.

    Args:
        rule: "likelihood", or "fit", which tolerates outliers better.
        discard: share of the largest ratios that "fit" leaves out.
        most: largest number of rows used, evenly spaced in the order of their index; the work grows with its square.
    """

    def __init__(
        self, rule: Literal["likelihood", "fit"] = "likelihood", discard: float = 0.1, most: int = 20_000
    ) -> None:
        if rule not in ("likelihood", "fit"):
            raise UserError(f"TwoNN rule={rule!r} must be likelihood or fit")
        if not 0 <= discard < 1:
            raise UserError(f"TwoNN discard={discard} must be at least 0 and below 1")
        if most < 3:
            raise UserError(f"TwoNN most={most} must be at least 3: each point needs two neighbours")
        self.rule, self.discard, self.most = rule, discard, most

    def fit(self, features: Features) -> Dimension:
        """Raises: UserError for fewer than 3 different points, or ratios that are all 1, as on a lattice."""
        mu_N = neighbour_ratios(spaced_rows(features.rows(), self.most))
        value = likeliest_dimension(mu_N) if self.rule == "likelihood" else fitted_dimension(mu_N, self.discard)
        if not value.isfinite():
            raise UserError(
                f"TwoNN: all {len(mu_N)} points have two neighbours equally far away, as on a lattice, so distances "
                "do not reveal a dimension; use features that are not rounded"
            )
        quantiles = mu_N.quantile(torch.arange(1, 100, dtype=mu_N.dtype) / 100)
        return Dimension(float(value), max(len(mu_N) - 2, 1) ** -0.5, len(mu_N), tuple(quantiles.tolist()))


@dataclass(frozen=True)
class SpectrumOfFeatures(Result):
    """Summary of the singular values of features; `energies` are the shares of the strongest directions, descending."""

    effective_rank: float
    participation_ratio: float
    stable_rank: float
    rows: int
    width: int
    energies: tuple[float, ...]

    def figures(self) -> tuple[Figure, ...]:
        return (
            Figure("effective rank", self.effective_rank),
            Figure("participation ratio", self.participation_ratio),
            Figure("stable rank", self.stable_rank),
            Figure("rows", self.rows),
            Figure("width", self.width),
        )

    def draw(self, axes: Any) -> None:
        axes.plot(range(1, len(self.energies) + 1), self.energies, "-o", color=COLOURS[0], markersize=3)
        axes.set(xlabel="direction", ylabel="share of the energy")
        if any(self.energies):
            axes.set_yscale("log")


class Spectrum(Estimator):
    """Effective rank, participation ratio and stable rank, from one pass over the features and over all ranks.

    The Gram matrix, D x D in float64, is all that is kept: singular values below 1e-8 of the largest are rounding.

    Args:
        center: subtract the mean first.
        shown: how many energies the result keeps.
    """

    def __init__(self, center: bool = True, shown: int = 256) -> None:
        if shown < 1:
            raise UserError(f"Spectrum shown={shown} must be at least 1")
        self.center, self.shown = center, shown

    def fit(self, features: Features) -> SpectrumOfFeatures:
        """Features that are all equal use 0 dimensions. Raises: UserError for features that are not finite."""
        moments = features.moments()
        gram_DD, mean_D = moments.within_DD, moments.mean_CD[0]
        if not self.center:
            gram_DD = gram_DD + moments.count * torch.outer(mean_D, mean_D)
        values_S = gram_singular_values(gram_DD)[: len(features)]
        return SpectrumOfFeatures(
            float(effective_rank(values_S)),
            float(participation_ratio(values_S)),
            float(stable_rank(values_S)),
            moments.count,
            gram_DD.shape[0],
            tuple(energy_shares(values_S)[: self.shown].tolist()),
        )
