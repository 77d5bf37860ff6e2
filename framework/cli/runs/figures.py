"""What a run counts for where runs are compared by a metric: one rule, for sweeps, their searches and reports.

A run that has reached its end counts for the last value that it logged, at whatever step: runs may be of different
length because a setting, or early stopping, says so. One that goes on, was stopped or killed, or failed counts for
nothing, since less training is another experiment; nor does one whose last value is not finite. A point with several
seeds counts for the mean of theirs. First come the points all of whose runs count, from the best to the worst, then
those some of whose runs do, then those without any.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightspan.cli.runs.direction import Mode
from lightspan.cli.runs.status import Status

LARGEST = 1e150
"""The size up to which a value has a mean and a deviation: squares of larger ones are beyond floats."""
_ENDED = (Status.DONE, Status.UNKNOWN)  # of what a script's own Trainer wrote nobody knows how it ended


def ended(status: Status | None) -> bool:
    """Whether a run counts; None if nobody asked what became of it, which is as good as unknown."""
    return status is None or status in _ENDED


def figure(status: Status | None, last: float | None) -> float | None:
    """What one run counts for, None for nothing.

    Args:
        last: the last value that it logged, NaN if that was not finite, None if there is none.
    """
    return last if ended(status) and last is not None and abs(last) <= LARGEST else None


@dataclass(frozen=True)
class SeedScores:
    """What runs count for that differ by their seed alone.

    Attributes:
        values: seed -> `figure`, of those that count; the key is None for the recipe's own seed.
        runs: how many runs there are, whether they count or not.
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

    def place(self, mode: Mode) -> tuple[bool, bool, float]:
        """Orders points as the rule says."""
        best_first = self.mean if mode == "min" else -self.mean
        return not self.complete, not self.values, best_first if self.values else 0.0


def scores(figures: Mapping[int | None, float | None], runs: int | None = None) -> SeedScores:
    """Of a point's runs, seed -> `figure`; `runs` is their number where some are not among them."""
    counting = {seed: value for seed, value in figures.items() if value is not None}
    return SeedScores(counting, len(figures) if runs is None else runs)


def standings(points: Sequence[SeedScores], mode: Mode) -> list[int | None]:
    """The number of each of these points, which are in their order, from 1: points that are equally good share one, and
    those that count for nothing have none.
    """
    first: dict[tuple[bool, bool, float], int] = {}
    for at, point in enumerate(points, 1):
        first.setdefault(point.place(mode), at)
    return [first[point.place(mode)] if point.values else None for point in points]
