"""What became of a run, from the files in its folder alone: no torch, no YAML, and about 0.1 ms for each run."""

import errno
import json
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lightspan.core.files.atomic import read_small
from lightspan.core.files.runs import (
    CSV_FOLDER,
    FAILED,
    HEARTBEATS,
    LOCK,
    METRICS,
    PREDICTIONS,
    RESOLVED,
    RESULT,
    SUMMARY,
    TESTED,
    VALIDATED,
)

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

SILENT_S = 120.0
"""Seconds without a heartbeat after which a run counts as stale; a watchdog writes one at least every ten seconds."""
_RESULTS = (RESULT, PREDICTIONS, VALIDATED, TESTED)


class Status(StrEnum):
    """What became of a run.

    - RUNNING: a process works in the folder, on this machine or another one.
    - STALE: it has ended, or stands still, and nobody was told why: it was killed, it hung, or its machine failed.
    - PREEMPTED: it stopped in order before its end: on a signal, or by Ctrl-C. Started again, it continues.
    - FAILED: an error ended it; failed.txt has the error.
    - DONE: it reached its end.
    - UNSTARTED: nothing is recorded: there is no folder, or the start was refused.
    - UNKNOWN: nothing says how it ended, for example because a script's own Trainer wrote the folder.
    """

    RUNNING = "running"
    STALE = "stale"
    PREEMPTED = "preempted"
    FAILED = "failed"
    DONE = "done"
    UNSTARTED = "unstarted"
    UNKNOWN = "unknown"


def status_of(run: Path, now: float | None = None) -> Status:
    """What became of the run in this folder, which need not exist.

    A run that is killed within its watchdog's first interval, ten seconds, has left no heartbeat; what an earlier start
    left in the folder, such as a summary, then speaks for it. Where several machines share a file system without locks,
    a run on another one is known by its heartbeats.

    Never call it from the process that trains in this folder: closing any handle of the lock file ends the lock.

    Args:
        now: seconds since the epoch, the present by default.
    """
    try:
        names = set(os.listdir(run))
    except OSError:
        return Status.UNSTARTED
    now = time.time() if now is None else now
    beat_s = _last_beat_s(run) if HEARTBEATS in names else None
    silent = beat_s is not None and now - beat_s > SILENT_S
    holder = _holder(run / LOCK) if LOCK in names else None
    if holder is not None:
        # Heartbeats from before the lock was taken are those of an earlier start.
        mine = beat_s is not None and beat_s >= holder.since_s
        if holder.works(heard=beat_s is not None and not silent):
            return Status.STALE if mine and silent else Status.RUNNING
    if FAILED in names:
        return Status.FAILED
    if beat_s is not None:
        return Status.STALE if silent or holder is not None else Status.RUNNING
    return _without_process(run, names)


def _without_process(run: Path, names: set[str]) -> Status:
    """What a folder says in which no process works, and which has neither heartbeats nor the mark of a failure."""
    if names.intersection(_RESULTS):
        return Status.DONE
    if SUMMARY in names and (finished := _finished(run / SUMMARY)) is not None:
        return Status.DONE if finished else Status.PREEMPTED
    if RESOLVED in names:
        # A fit that ends in order makes its table of metrics last; without a lock, a fit did not write this.
        return Status.STALE if LOCK in names and CSV_FOLDER not in names else Status.UNKNOWN
    return Status.UNKNOWN if METRICS in names else Status.UNSTARTED


def _finished(summary: Path) -> bool | None:
    try:
        finished = json.loads(read_small(summary) or b"")["finished"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return finished if isinstance(finished, bool) else None


def _last_beat_s(run: Path) -> float | None:
    """When a rank last wrote its heartbeat, in seconds since the epoch; None if no heartbeat is there."""
    try:
        with os.scandir(run / HEARTBEATS) as entries:
            return max(_times_s(entries), default=None)
    except OSError:
        return None


def _times_s(entries: Iterable["os.DirEntry[str]"]) -> Iterable[float]:
    for entry in entries:
        if entry.name.endswith(".json"):
            try:
                yield entry.stat(follow_symlinks=False).st_mtime
            except OSError:  # a run that ends removes its heartbeats
                continue


@dataclass(frozen=True)
class _Holder:
    """The process that has, or had, a run folder for itself.

    Attributes:
        since_s: when it took the lock, in seconds since the epoch.
        locked: whether it still has it; None where the file system cannot say.
        here: whether it is, or was, on this machine.
    """

    since_s: float
    locked: bool | None
    here: bool

    def works(self, heard: bool) -> bool:
        """Whether it is alive. A lock that is free here may be held on another machine: then the heartbeats count."""
        return bool(self.locked) or (heard and not (self.here and self.locked is False))


def _holder(lock: Path) -> _Holder | None:
    try:
        descriptor = os.open(lock, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    try:
        text = os.read(descriptor, 1000).decode(errors="replace").strip()
        return _Holder(os.fstat(descriptor).st_mtime, _is_locked(descriptor), text.endswith(f" on {_HOST}"))
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool | None:
    if fcntl is None:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back when the file is closed, a moment later
    except OSError as error:
        return True if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return False


_HOST = socket.gethostname()
