"""The points of a sweep: what `key=a,b,c`, `key=log(lo,hi,n)` and `key=lin(lo,hi,n)` mean, as plain values.

A list is split at the commas outside brackets, braces and quotes, and each part is read as the YAML of a flag. `log`
spaces its values evenly in the logarithm, `lin` evenly; a range whose ends are both whole numbers gives whole numbers.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from lightspan.cli.config.secrets import redacted
from lightspan.cli.config.tree import COMMAND_LINE, parse, plain
from lightspan.core.errors import UserError

MOST_POINTS = 100_000
_RANGE = re.compile(r"(log|lin)\((.*)\)", re.DOTALL)
_CALL = re.compile(r"[A-Za-z_]\w*\(.*,.*\)", re.DOTALL)
_CLOSED_BY = {"(": ")", "[": "]", "{": "}"}
_QUOTED = {'"': re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL), "'": re.compile(r"'(?:[^']|'')*'", re.DOTALL)}
_DIGITS = 6  # significant ones of a computed value: it is typed again as a flag, and names a folder


@dataclass(frozen=True)
class Choices:
    """Two or more different values, in the order given."""

    values: tuple[Any, ...]

    def grid(self) -> tuple[Any, ...]:
        return self.values

    def at(self, share: float) -> Any:
        """The value at `share` in [0, 1): each has an equal part of it."""
        return self.values[int(share * len(self.values))]

    def ends(self) -> tuple[Any, ...]:
        """The values that show whether all are allowed."""
        return self.values

    def text(self) -> str:
        """As on the command line."""
        return ",".join(map(written, self.values))

    def record(self) -> dict[str, Any]:
        return {"values": list(self.values)}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included, low < high; above 0 where they are spaced by their logarithm.

    Attributes:
        log: whether they are spaced evenly in the logarithm.
        points: how many values a grid has, at least 2; None for any number in between.
    """

    low: float
    high: float
    log: bool
    points: int | None = None

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def grid(self) -> tuple[float, ...]:
        """The `points` values, the ends exactly as given. Raises: UserError where there are none or too few numbers."""
        if self.points is None:
            raise UserError(f"{self.text()} has no number of points, which a grid needs: write {self._with(5)}")
        inner = [self._between(at / (self.points - 1)) for at in range(1, self.points - 1)]
        values = (self.low, *inner, self.high)
        if len(set(values)) < len(values):
            raise UserError(f"{self.text()} gives the same value twice; lower the number of points")
        return values

    def at(self, share: float) -> float:
        """The number at `share` in [0, 1); with `points`, one of the grid's."""
        if self.points is not None:
            return self.grid()[int(share * self.points)]
        if self.whole and not self.log:  # each whole number has an equal part
            return int(self.low) + int(share * (self.high - self.low + 1))
        return self._between(share)

    def ends(self) -> tuple[float, ...]:
        return (self.low, self.high)

    def text(self) -> str:
        return self._with(self.points)

    def record(self) -> dict[str, Any]:
        return {"log" if self.log else "uniform": [self.low, self.high], "points": self.points}

    def _between(self, share: float) -> float:
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return round(value) if self.whole else self.rounded(value)

    def rounded(self, value: float) -> float:
        """A number of the range with few enough digits for a flag and the name of a folder."""
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def _with(self, points: int | None) -> str:
        last = "" if points is None else f",{points}"
        return f"{'log' if self.log else 'lin'}({written(self.low)},{written(self.high)}{last})"


Axis = Choices | Range
Settings = dict[str, Any]
"""Key -> value, in the order of the keys: one point."""


def axes_of(flags: Sequence[str]) -> tuple[dict[str, Axis], list[str]]:
    """Separates the keys of a sweep from flags with one value.

    Args:
        flags: `key.path=value`, as `lightspan.cli.config.flags.split_flags` gives them.
    Returns: (key -> axis, the ordinary flags), each in the order given.
    Raises: UserError for a list or range that cannot be read, and for a key given twice.
    """
    axes: dict[str, Axis] = {}
    rest: list[str] = []
    for flag in flags:
        key, _, text = flag.partition("=")
        axis = read_axis(key, text)
        if axis is None:
            rest.append(flag)
        elif key in axes or any(word.partition("=")[0] == key for word in flags if word != flag):
            raise UserError(f"{key} is given twice; put all of its values into one list")
        else:
            axes[key] = axis
    return axes, rest


def read_axis(key: str, text: str) -> Axis | None:
    """What `key=text` runs through; None for a single value. Raises: UserError."""
    shown = redacted([f"{key}={text}"])[0]
    if found := _RANGE.fullmatch(text.strip()):
        return _read_range(shown, found[1] == "log", found[2].split(","))
    if _CALL.fullmatch(text.strip()):
        raise UserError(f"{shown}: a range is log(low,high,points) or lin(low,high,points)")
    parts = _split(shown, text)
    if len(parts) == 1:
        return None
    if not all(part.strip() for part in parts):
        raise UserError(f"{shown}: a value between two commas, or at an end, is empty; write null for nothing")
    values = tuple(plain(parse(part, COMMAND_LINE, line_numbers=False)) for part in parts)
    return _choices(shown, values)


def axis_from(key: str, record: Any) -> Axis:
    """The axis of a `record()`. Raises: UserError for anything else."""
    if isinstance(record, dict):
        if isinstance(values := record.get("values"), list):
            return _choices(f"{key}: {values}", tuple(values))
        for kind in ("log", "uniform"):
            if isinstance(ends := record.get(kind), list) and len(ends) == 2:
                return _range(f"{key}: {record}", ends[0], ends[1], kind == "log", record.get("points"))
    raise UserError(f"{key}: {str(record)[:80]} is neither a list of values nor a range")


def grid(axes: Mapping[str, Axis]) -> list[Settings]:
    """Every combination; the last key changes fastest. Without keys there is one point, which sets nothing."""
    columns = [axis.grid() for axis in axes.values()]
    count = math.prod(map(len, columns))
    if count > MOST_POINTS:
        raise UserError(f"this grid has {count:,} points, and at most {MOST_POINTS:,} are allowed; use --method random")
    return [dict(zip(axes, values, strict=True)) for values in product(*columns)]


def drawn(axes: Mapping[str, Axis], seed: int, count: int) -> list[Settings]:
    """`count` different points at random. Point i depends on (seed, i, key) and on the points before it alone, so a
    larger count only adds points.

    Raises: UserError for more points than there are, or than chance meets.
    """
    most = _size(axes)
    patience = max(1000, 20 * most)
    if count > most:
        raise UserError(f"--trials {count}: these keys have only {most:,} different points; use --method grid for all")
    points: list[Settings] = []
    seen: set[str] = set()
    for number in range(count):
        attempt = 0
        while (text := json.dumps(point := _draw(axes, seed, number, attempt))) in seen:
            attempt += 1
            if attempt > patience:
                raise UserError(f"--trials {count}: after {number:,} different points none comes; lower it")
        seen.add(text)
        points.append(point)
    return points


def flags_of(point: Mapping[str, Any]) -> list[str]:
    """The point as flags, `key.path=value`."""
    return [f"{key}={written(value)}" for key, value in point.items()]


def written(value: Any) -> str:
    """A value as the shortest text that a flag reads back to the same value, and that a list may contain."""
    if isinstance(value, str):
        bare = _reads_as(value, value) and value == value.strip() and not re.search(r"[,()\[\]{}'\"#]", value)
        if bare:
            return value
    text = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    """A control character, or another that YAML does not take as it is, inside quotes."""
    return f"\\x{ord(letter):02x}" if ord(letter) < 256 else f"\\U{ord(letter):08x}"


def _reads_as(text: str, value: str) -> bool:
    try:
        return plain(parse(text, COMMAND_LINE, line_numbers=False)) == value
    except UserError:
        return False


def _split(shown: str, text: str) -> list[str]:
    """The parts between the commas outside brackets and quotes. Raises: UserError for those that are not closed."""
    parts: list[str] = []
    open_: list[str] = []
    start = at = 0
    while at < len(text):
        letter, before = text[at], text[start:at].rstrip()
        if letter in _QUOTED and (not before or before[-1] in "[{(,:"):  # elsewhere it is an apostrophe
            if (quoted := _QUOTED[letter].match(text, at)) is None:
                open_.append(letter)
                break
            at = quoted.end() - 1
        elif letter in _CLOSED_BY:
            open_.append(_CLOSED_BY[letter])
        elif open_ and letter == open_[-1]:
            open_.pop()
        elif letter == "," and not open_:
            parts.append(text[start:at])
            start = at + 1
        at += 1
    if open_ and parts:
        raise UserError(f"{shown}: {open_[-1]} is missing")
    return [*parts, text[start:]]


def _choices(shown: str, values: tuple[Any, ...]) -> Choices:
    if any(isinstance(value, float) and not math.isfinite(value) for value in values):
        raise UserError(f"{shown}: a sweep runs through finite values only")
    if json.loads(json.dumps(values)) != list(values):
        raise UserError(f"{shown}: the keys of a mapping must be text here; put them into quotes")
    seen: set[str] = set()
    for value in values:
        if (text := json.dumps(value)) in seen:
            raise UserError(f"{shown}: {written(value)} is given twice")
        seen.add(text)
    if len(values) < 2:
        raise UserError(f"{shown}: a list needs at least two values")
    return Choices(values)


def _read_range(shown: str, log: bool, words: Sequence[str]) -> Range:
    numbers = [plain(parse(word, COMMAND_LINE, line_numbers=False)) for word in words]
    if len(numbers) not in (2, 3):
        raise UserError(f"{shown}: a range has two ends and, for a grid, a number of points, such as log(1e-4,1e-1,4)")
    return _range(shown, numbers[0], numbers[1], log, numbers[2] if len(numbers) == 3 else None)


def _range(shown: str, low: Any, high: Any, log: bool, points: Any) -> Range:
    if not all(
        isinstance(end, int | float) and not isinstance(end, bool) and abs(end) <= sys.float_info.max
        for end in (low, high)
    ):
        raise UserError(f"{shown}: the ends of a range are finite numbers")
    if not low < high:
        raise UserError(f"{shown}: the first end must be below the second")
    if log and low <= 0:
        raise UserError(f"{shown}: the ends of log() must be above 0; lin() takes any")
    if points is not None and (
        not isinstance(points, int) or isinstance(points, bool) or not 2 <= points <= MOST_POINTS
    ):
        raise UserError(f"{shown}: the number of points must be a whole number from 2 to {MOST_POINTS:,}")
    return Range(low, high, log, points)


def _size(axes: Mapping[str, Axis]) -> float:
    """How many different points there are, at most; infinite with a range of real numbers around 0."""
    sizes: list[float] = []
    for axis in axes.values():
        if isinstance(axis, Choices) or axis.points is not None:
            sizes.append(len(axis.grid()))
        elif axis.whole:
            sizes.append(axis.high - axis.low + 1)
        else:
            near, far = sorted((abs(axis.low), abs(axis.high)))
            sizes.append(_place(far) - _place(near) + 1 if axis.low > 0 or axis.high < 0 else math.inf)
    return math.inf if math.inf in sizes else math.prod(sizes)


def _place(value: float) -> int:
    """Of a number above 0 among the numbers that have `_DIGITS` digits."""
    digits, exponent = f"{value:.{_DIGITS - 1}e}".split("e")
    return 9 * 10 ** (_DIGITS - 1) * int(exponent) + int(digits.replace(".", ""))


def _draw(axes: Mapping[str, Axis], seed: int, number: int, attempt: int) -> Settings:
    return {key: axis.at(_share(f"{seed}/{number}/{attempt}/{key}")) for key, axis in axes.items()}


def _share(text: str) -> float:
    """A number in [0, 1) that a text determines."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
