"""What the trials of a sweep reached: the last value of a metric, and its mean and spread over the seeds of a point."""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightspan.config.problems import nearest
from lightspan.report.runs import AXES
from lightspan.run_files import METRICS
from lightspan.runs.metric_values import TAIL, read_logged
from lightspan.runs.status import Status, status_of
from lightspan.sweeps.files import Sweep, Trial
from lightspan.sweeps.points import Settings


@dataclass(frozen=True)
class SeedScores:
    """A metric over runs that differ by their seed alone: of those that are done and logged a finite value.

    Attributes:
        values: seed -> last value; the key is None for the recipe's own seed.
        runs: how many runs there are, finished or not.
    """

    values: Mapping[int | None, float]
    runs: int

    @property
    def mean(self) -> float:
        """NaN without values."""
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def spread(self) -> float:
        """The standard deviation, by n - 1; NaN for fewer than two values."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else math.nan

    @property
    def complete(self) -> bool:
        return len(self.values) == self.runs


def ranked(sweep: Sweep, folder: Path, metric: str) -> list[tuple[Settings, SeedScores]]:
    """The points from the best mean to the worst; then those with a result of some seeds only, then those without."""
    sign = 1 if sweep.mode == "min" else -1

    def place(one: tuple[Settings, SeedScores]) -> tuple[bool, bool, float]:
        return not one[1].complete, not one[1].values, sign * one[1].mean if one[1].values else 0.0

    found = []
    for trials in by_point(sweep):
        scores = {trial.seed: score(folder / trial.run, metric) for trial in trials}
        finite = {seed: value for seed, value in scores.items() if value is not None and math.isfinite(value)}
        found.append((trials[0].values, SeedScores(finite, len(trials))))
    return sorted(found, key=place)


def by_point(sweep: Sweep) -> list[tuple[Trial, ...]]:
    """The trials of each point, in order."""
    count = len(sweep.seeds or (None,))
    return [sweep.trials[first : first + count] for first in range(0, len(sweep.trials), count)]


def score(run: Path, metric: str) -> float | None:
    """The last value of a metric of a run that is done: NaN if that is not finite, or was never logged. None for a run
    that is not done.
    """
    if status_of(run) is not Status.DONE:
        return None
    found = read_logged(run / METRICS, [metric]).values.get(metric)
    return math.nan if found is None or found.last is None else found.last


def unlogged(run: Path, metric: str) -> str | None:
    """What to say of a run that is done and never logged a metric; None if it did."""
    logged = last_values(run)
    if metric in logged:
        return None
    names = ", ".join(logged) or "nothing"
    return f"--metric {metric}: {run.name} never logged it; {nearest(metric, list(logged))}it logged {names}"


def over_seeds(sweep: Sweep, folder: Path) -> dict[str, SeedScores]:
    """Of a sweep over seeds alone: each metric that a run logged, in the order in which they first appear."""
    found: dict[str, dict[int | None, float]] = {}
    for trial in sweep.trials:
        if status_of(folder / trial.run) is Status.DONE:
            for name, value in last_values(folder / trial.run).items():
                if math.isfinite(value):
                    found.setdefault(name, {})[trial.seed] = value
    return {name: SeedScores(values, len(sweep.trials)) for name, values in found.items()}


def last_values(run: Path) -> dict[str, float]:
    """The last value of every metric in metrics.jsonl; NaN for null. A line that is no JSON is left out."""
    found: dict[str, float] = {}
    for row in _rows(_read(run / METRICS, None)):
        metrics = {name: value for name, value in row.items() if name not in AXES}
        found |= {name: math.nan if value is None else value for name, value in metrics.items() if _is_value(value)}
    return found


def last_step(run: Path) -> int | None:
    """How many steps a run has logged, from the end of metrics.jsonl alone; None before the first."""
    steps = [row["step"] for row in _rows(_read(run / METRICS, TAIL)) if isinstance(row.get("step"), float)]
    return 1 + int(steps[-1]) if steps and math.isfinite(steps[-1]) else None


def _read(path: Path, tail: int | None) -> bytes:
    try:
        with path.open("rb") as file:
            if tail is not None:
                file.seek(max(0, path.stat().st_size - tail))
            return file.read()
    except OSError:
        return b""


def _rows(content: bytes) -> list[dict[str, Any]]:
    """The JSON objects among the lines; a killed run may have cut the last one, and a tail the first."""
    rows = []
    for line in content.splitlines():
        try:
            row = json.loads(line, parse_int=float)  # of any length
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _is_value(value: Any) -> bool:
    return value is None or isinstance(value, float)
