"""Dimension of the manifold that points lie on, from the distances to their two nearest neighbours (TwoNN), or to
further ones (Gride).

Source: Facco, d'Errico, Rodriguez, Laio, "Estimating the intrinsic dimension of datasets by a minimal neighborhood
information", Scientific Reports 7 (2017), arXiv 1803.06992. If density is constant up to the second neighbour, the
ratio mu = r2 / r1 of a point's two distances has P(mu <= t) = 1 - t^-d (equation 4): it depends only on the dimension
d. Ratios do not depend on scale or rotation, and dimensions that the manifold leaves empty do not count. Estimates are
too small if there are few points for the dimension, as above d = 20 for thousands of points.

Over scales: Denti, Doimo, Laio, Mira, "The generalized ratios intrinsic dimension estimator", Scientific Reports 12
(2022), arXiv 2104.13832. mu = r_{2n} / r_n of the n-th and the 2n-th neighbour has a density of d alone, from which the
likeliest d follows; n grows with the scale. With n = 1 it is TwoNN.

What a linear map can see, such as the participation ratio of centred features, is in
`lightspan.evaluation.geometry.spectra`; it is never below the dimension of a flat manifold, and much above that of a
curved one.

Shapes: N points, D coordinates, Q points per chunk.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy.optimize import brentq
from torch import Tensor

from lightspan.core.drawing import COLOURS
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.spectra import (
    effective_rank,
    energy_shares,
    gram_singular_values,
    participation_ratio,
    stable_rank,
)
from lightspan.evaluation.rows import spaced_rows
from lightspan.evaluation.scale import scaled


def likeliest_dimension(mu_N: Tensor) -> Tensor:
    """The dimension that makes the ratios likeliest, corrected for bias: (N - 1) / sum log mu, 0-d float64.

    d / N times the sum of the logarithms is a Gamma variable of shape N, so the relative standard error is
    1 / sqrt(N - 2). Infinite if all ratios are 1, as on a lattice.
    """
    return (len(mu_N) - 1) / mu_N.log().sum()


def two_nn_fit(points_ND: Tensor, discard: float = 0.1) -> Tensor:
    """`fitted_dimension` of the points' ratios. Raises: UserError as `neighbour_ratios`, and for `discard`."""
    _require_share(discard)
    return fitted_dimension(neighbour_ratios(points_ND), discard)


def fitted_dimension(mu_N: Tensor, discard: float = 0.1) -> Tensor:
    """Slope of the line through the origin and (log mu_i, -log(1 - i / N)), mu ascending (section 2 of the paper), 0-d.

    The largest ratios come from points whose density changes, and are noisy: a share `discard` of them is ignored. With
    it the fit tolerates outliers better than the likelihood. Infinite if all ratios are 1.

    Args:
        discard: share in [0, 1) of the largest ratios left out; the last one always is, since its ordinate is infinite.
    Raises: UserError for `discard` out of range.
    """
    _require_share(discard)
    mu_N = mu_N.sort().values
    count = len(mu_N)
    kept = min(count - 1, max(1, round(count * (1 - discard))))
    share_N = torch.arange(1, kept + 1, dtype=mu_N.dtype, device=mu_N.device) / count
    x_N, y_N = mu_N[:kept].log(), -torch.log1p(-share_N)
    slope = (x_N * y_N).sum() / x_N.square().sum()
    return torch.where(x_N.any(), slope, torch.full_like(slope, torch.inf))


def gride(mu_N: Tensor, nearer: int) -> tuple[float, float]:
    """(dimension, its standard error) by the ratios of the distances to the 2n-th and the n-th neighbour, n = `nearer`.

    The error is that of the likelihood's curvature, as if points were independent: it is too small for n above 1, where
    neighbourhoods overlap. N - 1 instead of N points, which takes the bias from n = 1 as in `likeliest_dimension`, is
    DADApy's. Infinite if all ratios are 1.
    """
    log_N = mu_N.double().log()
    count, total = len(log_N), float(log_N.sum())
    if total <= 0:
        return math.inf, math.inf

    def slope(dimension: float) -> float:
        """Of the log likelihood, times the dimension: falls, and has one root."""
        x_N = dimension * log_N
        grown_N = torch.where(x_N > 0, x_N / -torch.expm1(-x_N), 1.0)
        return count - 1 + (nearer - 1) * float(grown_N.sum()) - (2 * nearer - 1) * dimension * total

    dimension = float(brentq(slope, 0.0, count / total, rtol=1e-12, xtol=1e-300))
    x_N = dimension * log_N
    curved_N = torch.where(x_N > 0, (x_N / -torch.expm1(-x_N)).square(), 1.0) * (-x_N).exp()
    return dimension, dimension * (count + (nearer - 1) * float(curved_N.sum())) ** -0.5


def neighbour_ratios(points_ND: Tensor, chunk: int = 256) -> Tensor:
    """mu = r2 / r1 >= 1 of each different point, float64, in no particular order; equal rows count once.

    Args:
        chunk: points at a time; memory is chunk * N distances. The result does not depend on it.
    Raises: UserError for fewer than 3 different points, coordinates that are not finite, or distances more than 150
        orders of magnitude below the largest coordinate.
    """
    first_N, second_N = neighbour_distances(points_ND, (1, 2), chunk).unbind(dim=1)
    return second_N / first_N


def neighbour_distances(points_ND: Tensor, ranks: Sequence[int], chunk: int = 256, who: str = "TwoNN") -> Tensor:
    """Distances of each different point to its neighbours of these ranks, 1 the nearest: float64 [N' R], as
    `neighbour_ratios`.

    Args:
        who: asks, for messages.
    Raises: UserError as `neighbour_ratios`, for fewer different points than max(ranks) + 1.
    """
    if not points_ND.isfinite().all():
        raise UserError(f"{who} got NaN or infinite coordinates, which have no neighbours; the model has diverged")
    scale, (points_ND,) = scaled(points_ND)
    different_ND = points_ND.unique(dim=0) if points_ND.numel() else points_ND[:1]
    needed = max(ranks) + 1
    if len(different_ND) < needed:
        each = "two neighbours" if needed == 3 else f"{needed - 1} neighbours"
        raise UserError(
            f"{who} got {len(different_ND)} different points of {len(points_ND)}, but needs {needed}: each must have "
            f"{each}; give more points, or check whether features have collapsed"
        )
    found = []
    for points_QD in different_ND.split(chunk):
        # Differences, not |a|^2 + |b|^2 - 2ab: close neighbours far from the origin would drown in rounding errors.
        distance_QN = torch.cdist(points_QD, different_ND, compute_mode="donot_use_mm_for_euclid_dist")
        nearest_QK = distance_QN.topk(needed, largest=False).values  # each is its own nearest
        found.append(nearest_QK[:, list(ranks)])
    distance_NR = torch.cat(found)
    if not (distance_NR > 0).all():
        raise UserError(
            f"{who} got different points whose distance is zero in float64 beside the largest coordinate; leave out "
            "outliers, or the points that are so close"
        )
    return distance_NR * scale


def _require_share(discard: float) -> None:
    if not 0 <= discard < 1:
        raise UserError(f"TwoNN discard={discard} must be at least 0 and below 1; the paper uses 0.1")


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
    """The dimension of the manifold that features lie on, by `lightspan.evaluation.geometry.dimension`.

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
