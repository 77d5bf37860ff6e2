"""Reads run folders: the results of a training run, without torch and without trusting the files.

A run folder contains metrics.jsonl (one JSON object per line: step, time_s and metrics) and, as far as the run got,
summary.json (flat figures), resolved.yaml (the whole configuration), provenance.json (versions, command, commit),
samples.jsonl ({"step", "text"} per line) and a folder of pictures.
"""

import functools
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightspan.cli.config.tree import plain, read
from lightspan.cli.report.curves import XY
from lightspan.cli.runs.json_lines import json_lines, value_of
from lightspan.cli.runs.metrics import AXES, is_number, is_value
from lightspan.cli.runs.status import Status
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import read_small, refuse_link_out
from lightspan.core.files.runs import FAILED, METRICS, PICTURES, PROVENANCE, RESOLVED, RESULT, SAMPLES, SUMMARY, WARNING

MOST_PICTURE_BYTES, MOST_PICTURES_BYTES = 2**24, 2**26  # of one, and of a run's together
MOST_METRICS_BYTES, MOST_SAMPLES_BYTES = 2**26, 2**22  # the last ones of a longer file are read
MOST_MAPPING_BYTES = 2**22  # of summary.json and provenance.json
PNG_MARK = b"\x89PNG\r\n\x1a\n"
_SPECTRUM = re.compile(r"^(spectrum/.+)/(\d+)$")


@dataclass(frozen=True)
class LoggedValue:
    """One logged value; `step` counts optimiser steps, `time_s` seconds since the fit began (NaN if not logged). Of a
    folded run it is a mean, and `spread` the standard deviation.
    """

    step: int
    time_s: float
    value: float
    spread: float | None = None


@dataclass(frozen=True)
class Run:
    """One run folder in memory: `rows` are the lines of metrics.jsonl, `config` is resolved.yaml unchanged.
    `pictures` are PNG files by name.

    `remarks` say what of the folder is not here because it is too large.

    `status` is known where somebody has asked for it: a run must not ask for its own. `draws` is how many runs stand
    for the same point of a sweep, of which each has another seed, whether they have figures or not.

    Of a run that `fold` made, rows and summary are means over its `members`; `row_spreads` and `spread` are the
    standard deviations of each row and of the summary, by name, and everything else is the first member's.
    """

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    config: dict[str, Any]
    provenance: dict[str, Any]
    samples: list[dict[str, Any]]
    pictures: dict[str, bytes] = field(default_factory=dict, repr=False)
    status: Status | None = None
    members: tuple["Run", ...] = ()
    draws: int = 1
    remarks: tuple[str, ...] = ()
    row_spreads: Sequence[dict[str, float]] = ()
    spread: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> list[str]:
        """Names of all metrics over steps, in the order in which they first appear, without parts of a spectrum."""
        return list(self._metrics)

    @functools.cached_property
    def _metrics(self) -> list[str]:
        known: dict[str, None] = {}
        for row in self.rows:
            known |= {name: None for name, value in row.items() if name not in known and is_value(value)}
        return [name for name in known if name not in AXES and not _SPECTRUM.match(name)]

    def points(self, metric: str) -> list[LoggedValue]:
        """Every logged value of `metric` in order; null in the file is a value that was not finite and becomes NaN."""
        found = []
        for at in self._places.get(metric, ()):
            row, spread = self.rows[at], self.row_spreads[at].get(metric) if self.row_spreads else None
            found.append(LoggedValue(int(row["step"]), _number(row.get("time_s")), _number(row[metric]), spread))
        return found

    @functools.cached_property
    def _places(self) -> dict[str, list[int]]:
        """The rows that have a value of each metric: of many metrics each is logged in few rows."""
        places: dict[str, list[int]] = {}
        for at, row in enumerate(self.rows):
            for name, value in row.items():
                if is_value(value):
                    places.setdefault(name, []).append(at)
        return places

    def warnings(self) -> list[str]:
        """What the run was warned of, in order."""
        return [text for row in self.rows if isinstance(text := row.get(WARNING), str)]

    def spectra(self) -> dict[str, tuple[int, list[XY]]]:
        """{name: (step, [(index, value)])} of the last spectrum that was logged as spectrum/NAME/INDEX."""
        found: dict[str, tuple[int, list[XY]]] = {}
        for row in self.rows:
            parts: dict[str, list[XY]] = {}
            for key, value in row.items():
                if (match := _SPECTRUM.match(key)) and is_number(value):
                    parts.setdefault(match[1], []).append((float(match[2]), float(value)))
            found |= {name: (int(row["step"]), sorted(points)) for name, points in parts.items()}
        return found


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads all run folders and gives every run its own name.

    Raises: UserError for a folder that is not a run, has no metrics, or contains a file that cannot be parsed.
    """
    return [load_run(folder, name) for folder, name in zip(folders, unique_names(folders), strict=True)]


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many parents as needed to distinguish them (a folder named twice: "-2")."""
    parts = [Path(os.path.realpath(folder)).parts for folder in folders]  # which stops at a circle of links
    names: list[str] = []
    for own in parts:
        depth, rivals = 1, [other for other in parts if other != own]
        while depth < len(own) and any(other[-depth:] == own[-depth:] for other in rivals):
            depth += 1
        names.append("/".join(own[-depth:]))
    return [f"{name}-{1 + names[:at].count(name)}" if name in names[:at] else name for at, name in enumerate(names)]


def load_run(folder: Path, name: str) -> Run:
    """Reads one run folder; see `load_runs`."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"run folder {str(folder)!r} {what}; name the folder in which `lightspan fit` wrote {METRICS}")
    if (folder / RESULT).is_file():
        raise UserError(
            f"{str(folder)!r} contains results of `lightspan run`, but report compares training runs; its figures "
            f"are in {folder / RESULT}"
        )
    if not (folder / METRICS).is_file():
        inside = sorted(path.parent.relative_to(folder).as_posix() for path in folder.glob(f"*/{METRICS}"))
        hint = (
            f"it contains the runs {', '.join(inside)}: name those"
            if inside
            else "name the folder that --run named; a script writes one with "
            "Trainer(logger=lightspan.training.loggers.jsonl.JsonlLogger(save_dir=FOLDER))"
        )
        if (folder / RESOLVED).is_file():
            raise _no_metric(folder)
        raise UserError(f"{str(folder)!r} is not a run folder: it has no {METRICS}; {hint}")
    for file in (METRICS, SUMMARY, RESOLVED, PROVENANCE, SAMPLES, PICTURES, FAILED):
        refuse_link_out(folder / file, folder, "its run folder")
    remarks: list[str] = []
    rows = _last_lines(folder / METRICS, MOST_METRICS_BYTES, remarks)
    for row in rows:
        if not isinstance(row.get("step"), int):
            raise UserError(f"{folder / METRICS}: a line has no whole-number 'step': {json.dumps(row)[:120]}")
    run = Run(
        name=name,
        folder=folder,
        rows=_shared_rate_names(rows),
        summary=_read_mapping(folder / SUMMARY, remarks),
        config=_read_mapping(folder / RESOLVED, remarks),
        provenance=_read_mapping(folder / PROVENANCE, remarks),
        samples=_last_lines(folder / SAMPLES, MOST_SAMPLES_BYTES, remarks),
        pictures=_read_pictures(folder / PICTURES, remarks),
    )
    if not run.metrics():
        if (folder / FAILED).is_file():
            text = (read_small(folder / FAILED) or b"").decode(errors="replace").strip()
            raise UserError(
                f"run {str(folder)!r} failed before it logged a metric ({text}); start it again, or leave it out"
            )
        raise _no_metric(folder)
    run = replace(run, remarks=tuple(remarks))
    return run if run.summary else _with_derived_summary(run)


def _no_metric(folder: Path) -> UserError:
    if (folder / SUMMARY).is_file():
        way_out = "it ended before trainer.log_every_n_steps; lower that number, or train for longer"
        return UserError(f"run {str(folder)!r} has logged no metric: {way_out}")
    return UserError(
        f"run {str(folder)!r} has logged no metric yet; wait until it has reached trainer.log_every_n_steps, or lower "
        "that number"
    )


def _last_lines(path: Path, most: int, remarks: list[str]) -> list[dict[str, Any]]:
    """The lines of a file, or of one that is too large the last."""
    if path.is_file() and (size := path.stat().st_size) > most:
        remarks.append(f"{path.name} has {size:,} bytes, of which the last {most:,} are shown")
    return list(json_lines(path, last=most))


def _with_derived_summary(run: Run) -> Run:
    """A run that was stopped wrote no summary: its last values are used instead, and `finished` says so. A script's
    Trainer never writes one, and nothing is known of its end.
    """
    last = {name.replace("/", "_"): run.points(name)[-1].value for name in run.metrics()}
    times = [_number(row.get("time_s")) for row in run.rows]
    seconds = {"seconds": max(times)} if all(map(math.isfinite, times)) else {}
    end = {"finished": False} if run.config else {}
    # A line's step is the number of those before it.
    derived = {**last, "steps": 1 + max(row["step"] for row in run.rows), **seconds, **end}
    return replace(run, summary=derived)


def _read_pictures(folder: Path, remarks: list[str]) -> dict[str, bytes]:
    """{name without ending: content} of the PNG files in a folder, the last of each series `NAME-STEP`; none if there
    is no such folder. What is no PNG inside is left out.
    """
    last = {re.sub(r"-\d+$", "", path.stem): path for path in sorted(folder.glob("*.png")) if not path.is_symlink()}
    found: dict[str, bytes] = {}
    left = MOST_PICTURES_BYTES
    for name, path in last.items():
        content = read_small(path, min(left, MOST_PICTURE_BYTES))
        if content is not None and content.startswith(PNG_MARK):
            found[name] = content
            left -= len(content)
        elif content is None and path.is_file():
            limits = f"{MOST_PICTURE_BYTES:,} bytes for one and {MOST_PICTURES_BYTES:,} for all"
            remarks.append(f"{path.name} is left out: pictures have a limit of {limits}")
    return found


def _shared_rate_names(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """`lr-AdamW/matrices` becomes `lr/matrices`, so that runs with different optimisers share a chart.

    A run that logs the rates of several optimisers keeps the full names.
    """
    rows = list(rows)
    prefix = re.compile(r"^lr-[^/]+")
    owners = {found.group() for row in rows for key in row if (found := prefix.match(key))}
    if len(owners) != 1:
        return rows
    return [{prefix.sub("lr", key): value for key, value in row.items()} for row in rows]


def _read_mapping(path: Path, remarks: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.suffix == ".yaml":
        value = plain(read(path))
    elif (content := read_small(path, MOST_MAPPING_BYTES)) is None:
        remarks.append(f"{path.name} is left out: it has more than {MOST_MAPPING_BYTES:,} bytes")
        return {}
    else:
        try:
            value = value_of(content.decode("utf-8", errors="replace"))
        except ValueError as error:
            raise UserError(f"{path} cannot be parsed ({error}); fix or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} contains a {type(value).__name__}, not a mapping; fix or remove it")
    return value


def _number(value: Any) -> float:
    return float(value) if is_number(value) else math.nan
