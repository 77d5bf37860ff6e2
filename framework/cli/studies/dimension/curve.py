"""Performance as a function of the dimension of random subspaces, and where it reaches the line."""

import math
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from lightspan.core.drawing import COLOURS, SOFT


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

    def draw(self, axes: Any, metric: str, threshold: float, references: dict[str, Any]) -> None:
        """Every seed as a dot, their means as a curve, the line, the baseline and what needs no training. The
        resulting dimension is marked.

        Args:
            references: "constant_answer" and "linear_probe", each a number or None.
        """
        points = {dim: point for dim, point in self.points.items() if point.values}
        for dim, point in points.items():
            axes.plot(
                [dim] * len(point.values), list(point.values.values()), "o", color=COLOURS[0], alpha=0.4, markersize=4
            )
        dims, means = list(points), [point.mean for point in points.values()]
        axes.plot(dims, means, "-o", color=COLOURS[0], linewidth=1.8, markersize=4.5, label="mean over seeds")
        axes.axhline(self.baseline.mean, color=SOFT, linewidth=1.2, label="all weights")
        axes.axhline(self.line, color=COLOURS[1], linewidth=1.2, label=f"line, threshold {threshold:g}")
        styles = {
            "linear_probe": ("linear probe, frozen features", "--"),
            "constant_answer": ("most frequent class", ":"),
        }
        for key, (label, style) in styles.items():
            if references.get(key) is not None:
                axes.axhline(references[key], color=SOFT, linewidth=1, linestyle=style, label=label)
        if self.reached is not None:
            axes.axvline(self.reached, color=COLOURS[1], linewidth=1, linestyle=":")
            axes.annotate(
                f"d = {self.reached:,}", (self.reached, self.line), xytext=(-5, 5), textcoords="offset points",
                color=COLOURS[1], fontweight="bold", ha="right",
            )  # fmt: skip
        positive = [dim for dim in dims if dim > 0]
        if positive and max(positive) > 10 * min(positive):
            axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)  # which has room for d = 0
            axes.set_xlim(dims[0] - 0.2 * min(positive), 1.15 * dims[-1])
        axes.set_xticks(dims, [f"{dim:,}" for dim in dims], rotation=45, ha="right", fontsize=8)
        axes.minorticks_off()
        axes.set(xlabel="dimension of the subspace d", ylabel=metric)
        axes.legend(frameon=False, fontsize=8)

    def _on_line(self, value: float) -> bool:
        return value >= self.line if self.mode == "max" else value <= self.line


def target(threshold: float, mode: Literal["max", "min"], baseline: float, untrained: float) -> float:
    """The line: threshold * baseline (arXiv 1804.08838, section 2).

    A metric to be minimised has no such share; there the share counts from the untrained network's value.
    """
    return threshold * baseline if mode == "max" else untrained + threshold * (baseline - untrained)
