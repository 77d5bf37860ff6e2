"""metrics.jsonl, read: the one module that does. All readers take a running or killed run's file as it stands.

`json_lines` gives its lines one by one. What is wanted of many runs at once, the end of the file and a few metrics,
is found by name without parsing the lines.
"""

import contextlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from lightspan.cli.runs.direction import Better
from lightspan.cli.runs.json_lines import LONGEST, json_lines, value_of
from lightspan.core.files.atomic import opened
from lightspan.core.files.foreign import BYTES

AXES = ("step", "time_s", "epoch")
"""Keys of a line that are no metrics."""
_LONGEST = 400  # bytes of a number
_TAIL = 2**16  # bytes at the end of a file in which its last line is looked for
_NUMBER = re.compile(rb"\s*([-+.\w]+)")
_SCORES = (
    re.compile(rb'"(val[/_][^"\\]*loss[^"\\]*)"\s*:'),
    re.compile(rb'"(val[/_][^"\\]*)"\s*:'),
    re.compile(rb'"(probe/[^"\\]*)"\s*:'),
    re.compile(rb'"((?:train[/_])?loss[^"\\]*)"\s*:'),
)


@dataclass(frozen=True)
class MetricValues:
    """Last, lowest and highest value of one metric; None where it has no finite one."""

    last: float | None
    lowest: float | None
    highest: float | None

    def best(self, direction: Better) -> float | None:
        """The lowest or the highest value, None if neither is better."""
        return {"lower": self.lowest, "higher": self.highest, "neither": None}[direction]


@dataclass(frozen=True)
class Logged:
    """What a metrics.jsonl holds: optimiser steps and seconds up to its last whole line, and some metrics by name."""

    steps: int | None
    seconds: float | None
    values: dict[str, MetricValues]


NOTHING = Logged(None, None, {})


def read_logged(path: Path, metrics: Sequence[str]) -> Logged:
    """Reads these metrics, or if none is named the first that looks like a validation loss, another score of
    validation, one of a probe, or a training loss. A file that is absent, irregular or damaged gives what can be read
    of it.
    """
    with _mapped(path) as content:
        if content is None:
            return NOTHING
        end, last = _end(content)
        names = metrics or _first_score(content, end)
        seconds = last.get("time_s")
        try:
            return Logged(
                _steps(last),
                float(seconds) if is_number(seconds) else None,
                {name: found for name in names if (found := _values(content, end, name)) is not None},
            )
        except (ValueError, OverflowError):
            return NOTHING


def last_step(path: Path) -> int | None:
    """How many steps a run has logged, from the end of the file alone; None before the first."""
    with _mapped(path) as content:
        return None if content is None else _steps(_end(content)[1])


def last_values(path: Path) -> dict[str, float]:
    """The last value of every metric, in the order in which they first appear; NaN for one that was not finite. Lines
    that are damaged are left out.
    """
    found: dict[str, float] = {}
    for row in json_lines(path, skip_damaged=True):
        metrics = {name: value for name, value in row.items() if name not in AXES and is_value(value)}
        found |= {name: math.nan if value is None else float(value) for name, value in metrics.items()}
    return found


def is_value(value: Any) -> bool:
    """Whether a line's entry is a value of a metric: a number, or null for one that was not finite."""
    return value is None or is_number(value)


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap | None]:
    """The content of a regular file that is neither empty nor above the limit of `BYTES`; None for any other."""
    with opened(path) as file:
        content = None
        with contextlib.suppress(OSError, ValueError):  # an empty file cannot be mapped
            if file is not None:
                BYTES.require(os.fstat(file.fileno()).st_size)
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            yield content
        finally:
            if content is not None:
                content.close()


def _end(content: mmap.mmap) -> tuple[int, dict[str, Any]]:
    """Where the last whole line ends, and that line; empty if it is no object. A line that is whole and lacks only its
    line break counts.
    """
    size = len(content)
    unfinished = _object(content, _begin(content, size), size)
    if unfinished is not None:
        return size, unfinished
    end = content.rfind(b"\n") + 1
    return end, _object(content, _begin(content, max(0, end - 1)), end) or {}


def _begin(content: mmap.mmap, end: int) -> int:
    return content.rfind(b"\n", max(0, end - _TAIL), end) + 1


def _object(content: mmap.mmap, begin: int, end: int) -> dict[str, Any] | None:
    if end - begin > LONGEST:
        return None
    try:
        found = value_of(content[begin:end].decode(errors="replace"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _steps(line: dict[str, Any]) -> int | None:
    step = line.get("step")
    return step + 1 if isinstance(step, int) else None  # a line's step is the number of those before it


def _first_score(content: mmap.mmap, end: int) -> list[str]:
    found = (pattern.search(content, 0, end) for pattern in _SCORES)
    return next(([match[1].decode(errors="replace")] for match in found if match), [])


def _values(content: mmap.mmap, end: int, name: str) -> MetricValues | None:
    """None if the name is not in the file."""
    last_at, last, lowest, highest = -1, None, None, None
    for spelling in {json.dumps(name), json.dumps(name, ensure_ascii=False)}:
        for at, text in _texts(content, end, spelling):
            number = _number(text)
            if at > last_at:
                last_at, last = at, number
            if number is not None:
                lowest = number if lowest is None else min(lowest, number)
                highest = number if highest is None else max(highest, number)
    return None if last_at < 0 else MetricValues(last, lowest, highest)


def _texts(content: mmap.mmap, end: int, quoted: str) -> Iterator[tuple[int, bytes]]:
    """(where, what) stands after each occurrence of a quoted name as a key."""
    key = quoted.encode("utf-8", "replace") + b":"
    at = content.find(key, 0, end)
    while at != -1:
        # Inside a longer name or a text, a quotation mark has a backslash before it.
        if content[at - 1 : at] != b"\\":
            number = _NUMBER.match(content, at + len(key), min(end, at + len(key) + _LONGEST))
            yield at, number[1] if number else b""
        at = content.find(key, at + len(key), end)


def _number(text: bytes) -> float | None:
    try:
        number = float(text)
    except ValueError:  # null, true
        return None
    return number if math.isfinite(number) else None
