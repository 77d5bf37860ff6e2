"""metrics.jsonl: one JSON object per line, readable by any program, also during the run."""

import json
import math
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, TextIO

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from lightspan.core.files.atomic import explained_os_errors, write_atomic
from lightspan.core.files.places import RunPath
from lightspan.core.files.runs import METRICS, WARNING


class JsonlLogger(Logger):
    """Appends {"step": int, "time_s": float, "<metric>": number, ...} to `save_dir`/metrics.jsonl, one line per call.

    `step` is Lightning's: the number of optimiser steps finished before the one that the line describes. `time_s` are
    seconds since fit began; a resumed run continues from the last line that it kept. Every line is flushed. JSON has no
    NaN and no infinity: such a value is written as null, so that a diverged run still leaves a readable file.
    A warning that `log_warning` gets is a line of its own, with the text as "warning" in place of metrics. Only rank 0
    writes. Hyperparameters are not kept here: the run folder's resolved.yaml has the whole configuration.

    Args:
        save_dir: the run folder; made if missing.
    """

    def __init__(self, save_dir: RunPath) -> None:
        super().__init__()
        self._path = Path(save_dir) / METRICS
        self._file: TextIO | None = None
        self._lines = 0
        self._started_s = 0.0

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._path.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> TextIO:
        """The open file. Lightning asks for it when fit begins, which is when the clock starts."""
        if self._file is None:
            self._started_s = time.monotonic() - _last_time_s(self._path)
            self._open()
        assert self._file is not None
        return self._file

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._write({name: plain_number(value) for name, value in metrics.items()}, step)

    @rank_zero_only
    def log_warning(self, text: str, step: int) -> None:
        self._write({WARNING: text}, step)

    def warnings(self) -> list[str]:
        """The texts of all warnings that the file has."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        entries = [_parsed(line) for line in lines if f'"{WARNING}"' in line]
        return [entry[WARNING] for entry in entries if entry and WARNING in entry]

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: see the class."""

    @rank_zero_only
    def position(self) -> int:
        """How many lines there are. They are on disk when this returns, so a checkpoint may rely on them."""
        file = self.experiment
        with explained_os_errors(self._path):
            os.fsync(file.fileno())
        return self._lines

    @rank_zero_only
    def rewind(self, step: int, lines: int | None = None) -> None:
        """Drop the lines of `step` and later, those after the first `lines`, and a torn one: the file then reads like
        one uninterrupted run.

        Called with the number of finished optimiser steps, and of lines, when a checkpoint is loaded for training.
        """
        if not self._path.exists():
            return
        self._close()
        before = self._path.read_text().splitlines()
        kept = [line for line in before[:lines] if (entry := _parsed(line)) is not None and entry["step"] < step]
        if kept != before:
            write_atomic(self._path, "".join(line + "\n" for line in kept))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._close()

    def _write(self, entries: dict[str, Any], step: int | None) -> None:
        file = self.experiment
        line = {"step": int(step or 0), "time_s": round(time.monotonic() - self._started_s, 3), **entries}
        with explained_os_errors(self._path):
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines += 1

    def _open(self) -> None:
        with explained_os_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lines = len(self._path.read_text().splitlines()) if self._path.exists() else 0
            self._file = self._path.open("a", buffering=1)  # line buffered: a whole line is one write

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def plain_number(value: Any) -> int | float | bool | None:
    """A JSON number from a Python, numpy or one-element tensor number; None if it is NaN or infinite."""
    number = value if isinstance(value, (bool, int)) else float(value)
    return number if math.isfinite(number) else None


def _last_time_s(path: Path) -> float:
    entries = [_parsed(line) for line in path.read_text().splitlines()[-2:]] if path.exists() else []
    return max((entry["time_s"] for entry in entries if entry), default=0.0)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and {"step", "time_s"} <= entry.keys() else None
