"""What a density or a temperature is after a share of the time in which a mask is learned.

A schedule goes from `start` to `end` between two shares of that time, and stays at its ends outside of them. With s in
[0, 1] between the two:

| schedule    | value                             | source                                                      |
|-------------|-----------------------------------|-------------------------------------------------------------|
| Linear      | start + (end - start) s           | -                                                           |
| Cubic       | end + (start - end) (1 - s)^3     | Zhu, Gupta, "To prune, or not to prune", 2017, arXiv        |
|             |                                   | 1710.01878, equation 1 (of the sparsity, 1 - density)       |
| Exponential | start (end / start)^s             | anneals a temperature by a factor a step                    |
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from lightspan.core.errors import UserError


class Schedule(ABC):
    """A number over time."""

    @abstractmethod
    def at(self, progress: float) -> float:
        """The value after the share `progress` in [0, 1]."""

    @abstractmethod
    def ends(self) -> tuple[float, float]:
        """The first and the last value; all others lie between them."""


@dataclass(frozen=True)
class Constant(Schedule):
    """One value all the time."""

    value: float

    def at(self, progress: float) -> float:
        return self.value

    def ends(self) -> tuple[float, float]:
        return self.value, self.value


@dataclass(frozen=True)
class _Ramp(Schedule):
    """From `start` to `end` between the shares `begin` and `until`.

    Args:
        start, end: finite.
        begin, until: 0 <= begin < until <= 1.
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise UserError(f"{type(self).__name__} start={self.start} and end={self.end} must be finite")
        if not 0 <= self.begin < self.until <= 1:
            raise UserError(
                f"{type(self).__name__} begin={self.begin} and until={self.until} are shares of the time in which the "
                "mask is learned: 0 <= begin < until <= 1"
            )

    def at(self, progress: float) -> float:
        return self._between(min(max((progress - self.begin) / (self.until - self.begin), 0.0), 1.0))

    def ends(self) -> tuple[float, float]:
        return self.start, self.end

    @abstractmethod
    def _between(self, s: float) -> float: ...


class Linear(_Ramp):
    """A straight line."""

    def _between(self, s: float) -> float:
        return self.start + (self.end - self.start) * s


class Cubic(_Ramp):
    """Fast at first, slow at the end: for a density, which falls fast while there is much to spare."""

    def _between(self, s: float) -> float:
        return self.end + (self.start - self.end) * (1 - s) ** 3


class Exponential(_Ramp):
    """By the same factor in the same time; both ends above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not min(self.start, self.end) > 0:
            raise UserError(f"Exponential start={self.start} and end={self.end} must be above 0; use Linear to reach 0")

    def _between(self, s: float) -> float:
        return self.start * (self.end / self.start) ** s


def schedule_of(value: float | Schedule) -> Schedule:
    """A number as a schedule that stays there. Raises: UserError for what is neither."""
    if isinstance(value, Schedule):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{value!r} must be a number, or a schedule such as Linear(1.0, 0.1)")
    return Constant(value)
