"""The values of a few metrics in a metrics.jsonl, found by their names without parsing the lines."""

import json
import math
import mmap
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightspan.runs.direction import Better

_LONGEST = 400  # bytes of a number
TAIL = 2**16  # bytes at the end of a file in which its last line is looked for
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
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return NOTHING
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_size == 0:
            return NOTHING
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1  # what follows is half a line
            last = _last_line(content, end)
            names = metrics or _first_score(content, end)
            steps, seconds = last.get("step"), last.get("time_s")
            return Logged(
                steps + 1 if isinstance(steps, int) else None,  # a line's step is the number of those before it
                float(seconds) if isinstance(seconds, int | float) else None,
                {name: found for name in names if (found := _values(content, end, name)) is not None},
            )
    except (OSError, ValueError, OverflowError):
        return NOTHING
    finally:
        os.close(descriptor)


def _last_line(content: mmap.mmap, end: int) -> dict[str, object]:
    begin = content.rfind(b"\n", max(0, end - TAIL), max(0, end - 1)) + 1
    try:
        found = json.loads(content[begin:end])
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _first_score(content: mmap.mmap, end: int) -> list[str]:
    found = (pattern.search(content, 0, end) for pattern in _SCORES)
    return next(([match[1].decode(errors="replace")] for match in found if match), [])


def _values(content: mmap.mmap, end: int, name: str) -> MetricValues | None:
    """None if the name is not in the file."""
    key = json.dumps(name).encode() + b":"
    texts = []
    at = content.find(key, 0, end)
    while at != -1:
        # Inside a longer name or a text, a quotation mark has a backslash before it.
        if content[at - 1 : at] != b"\\":
            number = _NUMBER.match(content, at + len(key), min(end, at + len(key) + _LONGEST))
            texts.append(number[1] if number else b"")
        at = content.find(key, at + len(key), end)
    if not texts:
        return None
    numbers = [_number(text) for text in texts]
    finite = [number for number in numbers if number is not None]
    return MetricValues(numbers[-1], min(finite, default=None), max(finite, default=None))


def _number(text: bytes) -> float | None:
    try:
        number = float(text)
    except ValueError:  # null, true
        return None
    return number if math.isfinite(number) else None
