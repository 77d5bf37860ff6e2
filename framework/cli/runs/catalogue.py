"""Run folders as a catalogue: which there are, what each was started with, how it stands and what it reached.

Only small files are parsed, and never resolved.yaml, so that two thousand runs take less than a second.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightspan.cli.runs.labels import note_of, tags_of
from lightspan.cli.runs.metrics import MetricValues, read_logged
from lightspan.cli.runs.status import Status, status_of
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import read_small
from lightspan.core.files.runs import FAILED, LOCK, METRICS, PROVENANCE, RESOLVED, SUMMARY, SWEEP

MARKS = frozenset({FAILED, LOCK, METRICS, PROVENANCE, RESOLVED})
"""Files of which each makes a folder a run folder."""
_NOT_SHOWN = ("--run", "--resume")  # options of `fit` that say nothing about the experiment
_NOWHERE = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True)
class Entry:
    """One run in the catalogue.

    Attributes:
        folder: as found below the folder that the user named.
        recipe: its name, "" if nothing recorded it.
        changes: what the command line said beside the recipe: overlays, flags, options.
        started: when it was first started.
        host: the machine that last worked on it, "" if not recorded.
        reason: why it failed, "" of any other run.
    """

    folder: Path
    recipe: str
    changes: tuple[str, ...]
    status: Status
    started: datetime | None
    host: str
    reason: str
    tags: tuple[str, ...]
    note: str

    @property
    def flags(self) -> dict[str, str]:
        """`key.path` -> the text of its value, as given on the command line."""
        return {key: value for key, _, value in (flag.partition("=") for flag in self._split[0])}

    @property
    def words(self) -> list[str]:
        """What the command line said beside the recipe and the flags."""
        return self._split[1]

    @property
    def _split(self) -> tuple[list[str], list[str]]:
        from lightspan.cli.config.flags import split_flags

        try:
            return split_flags(list(self.changes))
        except UserError:  # a record need not be a line that could be typed
            return [], list(self.changes)

    @property
    def age_key(self) -> tuple[datetime, str]:
        """Orders runs by their start."""
        return self.started or _NOWHERE, str(self.folder)


@dataclass(frozen=True)
class Progress:
    """How far a run came: optimiser steps, seconds of training over all its starts, and the metrics asked for."""

    steps: int | None
    seconds: float | None
    values: dict[str, MetricValues]


def find_runs(roots: Sequence[Path]) -> list[Path]:
    """All run folders at or below these folders, sorted. Links to folders are not followed, except as a root.

    Raises: UserError for a root that is not a folder.
    """
    found: dict[Path, None] = {}
    for root in roots:
        if not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            raise UserError(f"{root} {what}; name the folder that contains your runs (default: runs)")
        found |= dict.fromkeys(_below(root))
    return sorted(found)


def _below(root: Path) -> Iterator[Path]:
    waiting = [str(root)]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                inside = list(entries)
        except OSError:  # not readable, or deleted meanwhile
            continue
        names = {entry.name for entry in inside}
        if names & MARKS and SWEEP not in names:  # a sweep locks its folder too, and its runs are below it
            yield Path(folder)
        else:
            waiting += [entry.path for entry in inside if entry.is_dir(follow_symlinks=False)]


def read_entry(run: Path) -> Entry:
    """What the small files of a run folder say. Files that are absent or damaged leave gaps."""
    record = _json(run / PROVENANCE)
    recipe, changes = _started_with(record)
    return Entry(
        folder=run,
        recipe=recipe,
        changes=changes,
        status=(status := status_of(run)),
        started=_first_start(record),
        host=_host(run),
        reason=failure(run) if status is Status.FAILED else "",
        tags=tags_of(run),
        note=note_of(run),
    )


def started_with(run: Path) -> tuple[str, tuple[str, ...]]:
    """The recipe of a run, and what the command line said beside it: of `Entry`, without looking at its process."""
    return _started_with(_json(run / PROVENANCE))


def _started_with(record: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    recipe, argv = record.get("recipe"), record.get("argv")
    words = [word for word in argv if isinstance(word, str)] if isinstance(argv, list) else []
    return recipe if isinstance(recipe, str) else "", tuple(_changes(words))


def read_progress(run: Path, metrics: Sequence[str] = ()) -> Progress:
    """How far a run came, with these metrics or, without names, its first score (see `read_logged`)."""
    logged, summary = read_logged(run / METRICS, metrics), _json(run / SUMMARY)
    seconds = summary.get("seconds")
    known = [time_s for time_s in map(_finite, (logged.seconds, seconds)) if time_s is not None]
    steps = [count for count in (logged.steps, summary.get("steps")) if isinstance(count, int)]
    taken = 0 if summary.get("steps") == 0 else max(steps, default=None)  # what a run of no steps logs has a line too
    return Progress(taken, max(known, default=None), logged.values)


def _finite(number: Any) -> float | None:
    """None for what is no finite number; JSON that others wrote may have NaN, and numbers that no float holds."""
    try:
        return float(number) if isinstance(number, int | float) and math.isfinite(number) else None
    except OverflowError:
        return None


def _changes(argv: Sequence[str]) -> Iterator[str]:
    """The words of a `lightspan fit RECIPE ...` line after the recipe, without the options that name a folder."""
    words = iter(argv[3:])
    for word in words:
        if word in _NOT_SHOWN:
            next(words, None)
        elif not word.startswith(tuple(f"{option}=" for option in _NOT_SHOWN)):
            yield word


def _first_start(record: dict[str, Any]) -> datetime | None:
    earlier = record.get("earlier")
    first = earlier[0] if isinstance(earlier, list) and earlier and isinstance(earlier[0], dict) else {}
    try:
        started = datetime.fromisoformat(str(first.get("started") or record.get("started")))
        return started if started.tzinfo else started.astimezone()
    except (ValueError, OverflowError):  # the latter for years that no zone reaches
        return None


def failure(run: Path) -> str:
    """When and why a run failed, in one line; "" if nothing is recorded."""
    return (read_small(run / FAILED) or b"").decode(errors="replace").strip().partition("\n")[0]


def _host(run: Path) -> str:
    """From the lock, which says `process 12 on HOST`."""
    return (read_small(run / LOCK, 1000) or b"").decode(errors="replace").strip().partition(" on ")[2]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_small(path) or b"null")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
