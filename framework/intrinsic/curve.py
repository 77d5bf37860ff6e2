"""Performance as a function of the dimension of random subspaces, and where it reaches the line."""

import math
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal


@dataclass(frozen=True)
class Point:
    """One dimension: the metric of each seed that finished, at which learning rate, and what other rates gave."""

    values: dict[int, float]
    lr: float | None
    tuning: dict[float, float]

    @property
    def mean(self) -> float:
        """NaN if no seed finished."""
        return mean(self.values.values()) if self.values else math.nan

    def record(self) -> dict[str, Any]:
        return {
            "mean": self.mean if self.values else None,
            "per_seed": {str(seed): value for seed, value in self.values.items()},
            "lr": self.lr,
            "tuning": {f"{lr:g}": value if math.isfinite(value) else None for lr, value in self.tuning.items()},
        }


@dataclass
class Curve:
    """The grid's points by ascending dimension; only grid points are used: nothing is interpolated."""

    mode: Literal["max", "min"]
    line: float
    baseline: Point
    points: dict[int, Point]

    @property
    def reached(self) -> int | None:
        """The first dimension whose mean reaches the line; None if there is none."""
        return next((dim for dim, point in self.points.items() if self._on_line(point.mean)), None)

    def by_seed(self) -> dict[int, int | None]:
        """The first dimension of each seed's own curve, for the same line."""
        return {
            seed: next((d for d, p in self.points.items() if self._on_line(p.values.get(seed, math.nan))), None)
            for seed in self.baseline.values
        }

    def record(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "dimension": self.reached,
            "dimension_by_seed": {str(seed): dim for seed, dim in self.by_seed().items()},
            "line": self.line,
            "baseline": self.baseline.record(),
            "points": [{"dim": dim, **point.record()} for dim, point in self.points.items()],
        }

    def _on_line(self, value: float) -> bool:
        return value >= self.line if self.mode == "max" else value <= self.line


def target(threshold: float, mode: Literal["max", "min"], baseline: float, untrained: float) -> float:
    """The line: threshold * baseline (arXiv 1804.08838, section 2).

    A metric to be minimised has no such share; there the share counts from the untrained network's value.
    """
    return threshold * baseline if mode == "max" else untrained + threshold * (baseline - untrained)
