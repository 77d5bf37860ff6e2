"""Reads run folders: the results of a training run, without torch and without trusting the files.

A run folder contains metrics.jsonl (one JSON object per line: step, time_s and metrics) and, as far as the run got,
summary.json (flat figures), resolved.yaml (the whole configuration), provenance.json (versions, command, commit),
samples.jsonl ({"step", "text"} per line) and a folder of pictures.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightspan.config.tree import MAX_DEPTH, plain, read
from lightspan.errors import UserError
from lightspan.files import read_small
from lightspan.report.curves import XY
from lightspan.run_files import FAILED, METRICS, PICTURES, PROVENANCE, RESOLVED, RESULT, SAMPLES, SUMMARY
from lightspan.runs.status import Status

MOST_PICTURE_BYTES = 2**24
PNG_MARK = b"\x89PNG\r\n\x1a\n"
AXES = ("step", "time_s", "epoch")
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

    `status` is known where somebody has asked for it: a run must not ask for its own.

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
    row_spreads: Sequence[dict[str, float]] = ()
    spread: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> list[str]:
        """Names of all metrics over steps, in the order in which they first appear, without parts of a spectrum."""
        names = (key for row in self.rows for key, value in row.items() if key not in AXES and _is_value(value))
        return [name for name in dict.fromkeys(names) if not _SPECTRUM.match(name)]

    def points(self, metric: str) -> list[LoggedValue]:
        """Every logged value of `metric` in order; null in the file is a value that was not finite and becomes NaN."""
        spreads = self.row_spreads or [{}] * len(self.rows)
        return [
            LoggedValue(int(row["step"]), _number(row.get("time_s")), _number(row[metric]), spread.get(metric))
            for row, spread in zip(self.rows, spreads, strict=True)
            if metric in row and _is_value(row[metric])
        ]

    def spectra(self) -> dict[str, tuple[int, list[XY]]]:
        """{name: (step, [(index, value)])} of the last spectrum that was logged as spectrum/NAME/INDEX."""
        found: dict[str, tuple[int, list[XY]]] = {}
        for row in self.rows:
            parts: dict[str, list[XY]] = {}
            for key, value in row.items():
                if (match := _SPECTRUM.match(key)) and _is_number(value):
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
    parts = [folder.resolve().parts for folder in folders]
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
            "Trainer(logger=lightspan.loggers.jsonl.JsonlLogger(save_dir=FOLDER))"
        )
        if (folder / RESOLVED).is_file():
            raise UserError(f"run {str(folder)!r} has logged no metric yet; wait until its first steps are done")
        raise UserError(f"{str(folder)!r} is not a run folder: it has no {METRICS}; {hint}")
    _refuse_links_out(folder)
    rows = _read_lines(folder / METRICS)
    for row in rows:
        if not isinstance(row.get("step"), int):
            raise UserError(f"{folder / METRICS}: a line has no whole-number 'step': {json.dumps(row)[:120]}")
    run = Run(
        name=name,
        folder=folder,
        rows=_shared_rate_names(rows),
        summary=_read_mapping(folder / SUMMARY),
        config=_read_mapping(folder / RESOLVED),
        provenance=_read_mapping(folder / PROVENANCE),
        samples=_read_lines(folder / SAMPLES) if (folder / SAMPLES).is_file() else [],
        pictures=_read_pictures(folder / PICTURES),
    )
    if not run.metrics():
        if (folder / FAILED).is_file():
            text = (read_small(folder / FAILED) or b"").decode(errors="replace").strip()
            raise UserError(
                f"run {str(folder)!r} failed before it logged a metric ({text}); start it again, or leave it out"
            )
        raise UserError(
            f"run {str(folder)!r} has logged no metric yet: {METRICS} has {len(rows)} lines without one; wait until it "
            "has reached trainer.log_every_n_steps, or lower that number"
        )
    return run if run.summary else _with_derived_summary(run)


def _refuse_links_out(folder: Path) -> None:
    """A run folder may come from somebody else: no file of the reader becomes part of a page."""
    home = folder.resolve()
    for name in (METRICS, SUMMARY, RESOLVED, PROVENANCE, SAMPLES, PICTURES, FAILED):
        path = folder / name
        place = Path(os.path.realpath(path))  # of circular links the link itself, where `resolve` fails
        if path.is_symlink() and (home not in place.parents or place.is_symlink()):
            where = "nowhere" if place.is_symlink() else "out of its run folder"
            raise UserError(f"{path} is a link that leads {where}; copy what it leads to, or remove it")


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


def _read_pictures(folder: Path) -> dict[str, bytes]:
    """{name without ending: content} of the PNG files in a folder, the last of each series `NAME-STEP`; none if there
    is no such folder. Files above `MOST_PICTURE_BYTES`, and what is no PNG inside, are left out.
    """
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.png")):
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= MOST_PICTURE_BYTES:
            content = path.read_bytes()
            if content.startswith(PNG_MARK):
                found[re.sub(r"-\d+$", "", path.stem)] = content
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


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines. A killed run may leave an incomplete last line, which is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except ValueError as error:
            if number == len(lines):
                continue
            raise UserError(f"{path}:{number} is not JSON ({error}): {line[:80]!r}; fix or remove it") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number} is not a JSON object: {line[:80]!r}; fix or remove it")
        rows.append(row)
    return rows


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.suffix == ".yaml":
        value = plain(read(path))
    else:
        try:
            value = _parsed(path.read_text(encoding="utf-8", errors="replace"))
        except ValueError as error:
            raise UserError(f"{path} cannot be parsed ({error}); fix or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} contains a {type(value).__name__}, not a mapping; fix or remove it")
    return value


def _parsed(text: str) -> Any:
    """JSON that floats can represent and a page can show. Raises: ValueError, also for too deep nesting."""
    try:
        value = json.loads(text, parse_int=_whole)
        if "\\u" in text:  # may have escaped half a surrogate pair, which is not text
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    level, depth = [value], 0
    while level:
        depth += 1
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    return value


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) < 19 else float(digits)  # a float beyond its range is infinite, and not drawn


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_value(value: object) -> bool:
    return value is None or _is_number(value)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else math.nan
