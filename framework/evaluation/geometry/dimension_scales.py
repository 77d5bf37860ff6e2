"""The dimension of the manifold that features lie on, as a function of the scale at which one looks.

At small distances noise fills all dimensions, at large ones the manifold bends: where the curve is flat, it tells the
dimension. Two ways to change the scale: further neighbours of all points (`Gride`), fewer points (`DecimatedTwoNN`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightspan.core.drawing import COLOURS
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.dimension import gride, likeliest_dimension, neighbour_distances
from lightspan.evaluation.rows import spaced_rows

FEWEST = 10
"""Points that a dimension is computed from."""


@dataclass(frozen=True)
class DimensionOverScales(Result):
    """A dimension at each scale, from small distances to large ones.

    Attributes:
        scales: mappings with `points` (of one estimate), `neighbours` (the larger of both ranks), `distance` (mean of
            both), `dimension`, `error` (standard error), `estimates` (how many the dimension is the mean of).
    """

    scales: tuple[Mapping[str, float], ...]

    def figures(self) -> tuple[Figure, ...]:
        found = []
        for row in self.scales:
            at = f"{row['points']} points, neighbour {row['neighbours']}"
            found += [Figure(f"dimension, {at}", row["dimension"]), Figure(f"standard error, {at}", row["error"])]
        return tuple(found)

    def table(self) -> tuple[dict[str, Any], ...]:
        return tuple(dict(row) for row in self.scales)

    def draw(self, axes: Any) -> None:
        x, y, error = ([row[key] for row in self.scales] for key in ("distance", "dimension", "error"))
        axes.errorbar(x, y, yerr=error, fmt="-o", color=COLOURS[0], markersize=3, capsize=2)
        axes.set(xlabel="mean distance of the neighbours", ylabel="dimension", xscale="log")
        axes.set_ylim(bottom=0)


class Gride(Estimator):
    """Ratios of the distances to the 2n-th and the n-th neighbour, n = 1, 2, 4, ...
    (`lightspan.evaluation.geometry.dimension`).

    Args:
        furthest: rank of the furthest neighbour looked at, or half of the points if that is less.
        most: largest number of rows used, evenly spaced in the order of their index; the work grows with its square.
    """

    def __init__(self, furthest: int = 64, most: int = 10_000) -> None:
        if furthest < 2:
            raise UserError(f"Gride furthest={furthest} must be at least 2")
        if most < FEWEST:
            raise UserError(f"Gride most={most} must be at least {FEWEST}")
        self.furthest, self.most = furthest, most

    def fit(self, features: Features) -> DimensionOverScales:
        """Raises: UserError for fewer than 10 different points, or ratios that are all 1, as on a lattice."""
        x_ND = spaced_rows(features.rows(), self.most)
        count = len(x_ND.unique(dim=0)) if x_ND.numel() and x_ND.isfinite().all() else len(x_ND)
        _require_points("Gride", count)
        furthest = min(self.furthest, count // 2)
        ranks = [2**i for i in range(int(math.log2(furthest)) + 1)]
        distance_NR = neighbour_distances(x_ND, ranks, who="Gride")
        rows = []
        for i, nearer in enumerate(ranks[:-1]):
            pair_N2 = distance_NR[:, i : i + 2]
            dimension, error = gride(pair_N2[:, 1] / pair_N2[:, 0], nearer)
            _require_finite("Gride", dimension, 2 * nearer)
            distance = float(pair_N2.mean())
            rows.append(_row(len(distance_NR), 2 * nearer, distance, dimension, error, 1))
        return DimensionOverScales(tuple(rows))


class DecimatedTwoNN(Estimator):
    """TwoNN on ever smaller random parts of the points: all, two halves, four quarters, ... as its paper does.

    The dimension is the mean over the parts, its error the standard error of that mean; for all points at once it is
    that of the likelihood.

    Args:
        fewest: points of the smallest parts.
        seed: of the parts.
        most: largest number of rows used, evenly spaced in the order of their index; the work grows with its square.
    """

    def __init__(self, fewest: int = 50, seed: int = 0, most: int = 10_000) -> None:
        if fewest < FEWEST:
            raise UserError(f"DecimatedTwoNN fewest={fewest} must be at least {FEWEST}")
        if seed < 0:
            raise UserError(f"DecimatedTwoNN seed={seed} must be at least 0")
        if most < FEWEST:
            raise UserError(f"DecimatedTwoNN most={most} must be at least {FEWEST}")
        self.fewest, self.seed, self.most = fewest, seed, most

    def fit(self, features: Features) -> DimensionOverScales:
        """Raises: UserError for fewer than 10 different points, or ratios that are all 1, as on a lattice."""
        x_ND = spaced_rows(features.rows(), self.most)
        if x_ND.numel() and x_ND.isfinite().all():  # others are refused with their neighbours
            x_ND = x_ND.unique(dim=0)
        _require_points("DecimatedTwoNN", len(x_ND))
        order = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(self.seed))
        rows, parts = [], 1
        while parts == 1 or len(x_ND) // parts >= self.fewest:
            size = len(x_ND) // parts
            found, distances = [], []
            for part in order[: size * parts].split(size):
                pair_N2 = neighbour_distances(x_ND[part.to(x_ND.device)], (1, 2), who="DecimatedTwoNN")
                found.append(float(likeliest_dimension(pair_N2[:, 1] / pair_N2[:, 0])))
                distances.append(float(pair_N2.mean()))
                _require_finite("DecimatedTwoNN", found[-1], 2)
            mean = sum(found) / parts
            spread = (
                torch.tensor(found, dtype=torch.float64).std() / parts**0.5 if parts > 1 else mean / (size - 2) ** 0.5
            )
            rows.append(_row(size, 2, sum(distances) / parts, mean, float(spread), parts))
            parts *= 2
        return DimensionOverScales(tuple(rows))


def _row(
    points: int, neighbours: int, distance: float, dimension: float, error: float, estimates: int
) -> Mapping[str, float]:
    found = {"points": points, "neighbours": neighbours, "distance": distance, "dimension": dimension}
    return found | {"error": error, "estimates": estimates}


def _require_points(who: str, count: int) -> None:
    if count < FEWEST:
        raise UserError(f"{who} got {count} different points, but needs {FEWEST}; give more, or look for a collapse")


def _require_finite(who: str, dimension: float, neighbour: int) -> None:
    if not math.isfinite(dimension):
        raise UserError(
            f"{who}: all points have neighbours {neighbour // 2} and {neighbour} equally far away, as on a lattice, so "
            "distances do not reveal a dimension; use features that are not rounded"
        )
