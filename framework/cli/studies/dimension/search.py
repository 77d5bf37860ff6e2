"""The search for d90: the baseline, then a grid of dimensions, each at the best of several learning rates.

Source: Li et al. 2018, arXiv 1804.08838, section 2: for increasing d the recipe is trained in theta_0 + P z with z of d
numbers, fresh theta_0 and P for each d and seed; d90 is the first d of the grid whose mean reaches the line.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from lightspan.cli.studies.dimension.curve import Curve, Point, target
from lightspan.core.errors import UserError
from lightspan.core.files.runs import OUTPUT

TUNING_SEED = -1
"""Rates are compared on a separate seed, from which no figure is reported."""


@dataclass(frozen=True)
class SearchSettings:
    """The search; `lrs` is [None] if the recipe's own rate is used."""

    grid: list[int]
    threshold: float
    metric: str
    mode: Literal["max", "min"]
    seeds: int
    lrs: list[float | None]
    lr_key: str
    projection: str
    layer_scales: bool
    stop_early: bool
    workers: int
    out: Path


@dataclass(frozen=True)
class Fit:
    """One run of the recipe; `dim` None trains all weights."""

    dim: int | None
    lr: float | None
    seed: int

    @property
    def name(self) -> str:
        where = "direct" if self.dim is None else f"d{self.dim}"
        rate = "" if self.lr is None else f"-lr{self.lr:g}"
        return f"{where}{rate}-" + ("tuning" if self.seed == TUNING_SEED else f"seed{self.seed}")

    def drawn(self) -> int:
        """The seed of theta_0 and of P: different for each dimension, the same for all rates."""
        return int.from_bytes(hashlib.sha256(f"{self.dim}/{self.seed}".encode()).digest()[:4], "big") >> 1


Train = Callable[[Sequence[Fit]], dict[Fit, float]]
"""Trains what is not trained yet. Returns the metric of each, NaN for one that failed."""


def search(settings: SearchSettings, references: Mapping[str, Any], train: Train) -> Curve:
    """The baseline, then the grid: all of it, or with `stop_early` up to the line. Raises: UserError if every
    run of the baseline fails.
    """
    untrained = {int(seed): value for seed, value in references["untrained"].items()}
    baseline = measure(settings, [None], train)[None]
    if not baseline.values:
        raise UserError(
            f"no run of the baseline finished with a value of {settings.metric}; the last lines of each are in "
            f"{settings.out / 'runs'}/direct*/{OUTPUT}"
        )
    line = target(settings.threshold, settings.mode, baseline.mean, mean(untrained.values()))
    curve = Curve(settings.mode, line, baseline, {})
    if settings.grid[0] == 0:
        curve.points[0] = Point(untrained, None, {})
    rest = [dim for dim in settings.grid if dim > 0]
    for dims in [[dim] for dim in rest] if settings.stop_early else [rest]:
        if curve.reached is not None and settings.stop_early:
            break
        curve.points.update(measure(settings, dims, train))
    return curve


def measure(settings: SearchSettings, dims: Sequence[int | None], train: Train) -> dict[Any, Point]:
    """The best rate of each dimension by the tuning seed, if there is a choice, and the seeds at that rate."""
    tried: dict[Fit, float] = {}
    if len(settings.lrs) > 1:
        tried = train([Fit(dim, lr, TUNING_SEED) for dim in dims for lr in settings.lrs])
    best = max if settings.mode == "max" else min
    chosen: dict[int | None, float | None] = {}
    for dim in dims:
        scores = {fit.lr: value for fit, value in tried.items() if fit.dim == dim and math.isfinite(value)}
        chosen[dim] = best(scores, key=scores.__getitem__) if scores else settings.lrs[0]
    found = train([Fit(dim, chosen[dim], seed) for dim in dims for seed in range(settings.seeds)])
    points = {}
    for dim in dims:
        values = {fit.seed: value for fit, value in found.items() if fit.dim == dim and math.isfinite(value)}
        tuning = {fit.lr: value for fit, value in tried.items() if fit.dim == dim and fit.lr is not None}
        points[dim] = Point(values, chosen[dim], tuning)
    return points
