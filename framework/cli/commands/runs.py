"""`lightspan runs [DIR...]`: the catalogue of runs as a table, CSV or JSON."""

import argparse
import csv
import io
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspan.cli.commands.arguments import file, folder
from lightspan.cli.commands.runs_table import ListedRun, print_table
from lightspan.core.errors import UserError, printable

if TYPE_CHECKING:
    from lightspan.cli.runs.direction import Mode
    from lightspan.cli.runs.filters import RunFilter

SHOWN = 50  # rows of the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_filter_arguments(parser)
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="show the last and best value of this metric; repeat it for more (default: the validation loss)",
    )
    parser.add_argument("--best", metavar="METRIC", help="order by the best value of this metric, best run first")
    parser.add_argument(
        "--mode", choices=("min", "max"), help="whether --best is the lowest or the highest (default: by its name)"
    )
    parser.add_argument("--sort", choices=tuple(ORDERS), default="started", help="order (default: newest first)")
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    parser.add_argument(
        "--limit", type=int, metavar="N", help=f"show the first N runs (default: {SHOWN} in the table, all elsewhere)"
    )
    parser.add_argument("--csv", type=file, metavar="FILE", help="write the rows to a file instead, - for the console")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead")


def add_filter_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR... and the options that `filter_from` reads."""
    from lightspan.cli.runs.status import Status

    parser.add_argument(
        "dirs",
        nargs="*",
        type=folder,
        default=[Path("runs")],
        metavar="DIR",
        help="folder in which runs are looked for, at any depth (default: runs)",
    )
    parser.add_argument(
        "--status", action="append", default=[], choices=[*map(str, Status)], help="only these; repeat it for more"
    )
    parser.add_argument(
        "--recipe", action="append", default=[], metavar="GLOB", help="only these recipes, for example 'language/*'"
    )
    parser.add_argument(
        "--where", action="append", default=[], metavar="KEY=VALUE", help="only runs with this setting; all if repeated"
    )
    parser.add_argument(
        "--tag", action="append", default=[], metavar="TAG", help="only runs with this tag; all if repeated"
    )
    parser.add_argument(
        "--since", metavar="WHEN", help="only runs started since: 30m, 12h, 7d, 2w ago, or a date such as 2026-01-31"
    )


def filter_from(args: argparse.Namespace) -> "RunFilter":
    """The filter that a command line means. Raises: UserError for a setting or time that is none."""
    from lightspan.cli.runs.filters import RunFilter, parse_setting, parse_since
    from lightspan.cli.runs.status import Status

    return RunFilter(
        statuses=[Status(status) for status in args.status],
        recipes=args.recipe,
        settings=[parse_setting(text) for text in args.where],
        tags=args.tag,
        since=None if args.since is None else parse_since(args.since),
    )


ORDERS: dict[str, Callable[[ListedRun], Any]] = {  # numbers that are missing come last
    "started": lambda row: row.entry.age_key,
    "status": lambda row: (str(row.entry.status), row.entry.age_key),
    "recipe": lambda row: (row.entry.recipe, row.entry.age_key),
    "step": lambda row: (row.progress.steps or -1, row.entry.age_key),
    "time": lambda row: (row.progress.seconds or -1.0, row.entry.age_key),
    "name": lambda row: str(row.entry.folder),
}
_DESCENDING = ("started", "step", "time")


def run(args: argparse.Namespace) -> int:
    """Prints the selected runs. Raises: UserError for a folder, time, setting or metric that does not exist."""
    from lightspan.cli.runs.catalogue import find_runs, read_entry

    chosen = filter_from(args)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} must be at least 1; leave it out to see all with --csv or --json")
    metrics = list(dict.fromkeys([*([args.best] if args.best else []), *args.metric]))
    entries = [entry for folder in find_runs(args.dirs) if chosen.has(entry := read_entry(folder))]
    rows = [ListedRun(entry, metrics) for entry in entries]
    rows.sort(key=ORDERS[args.sort], reverse=(args.sort in _DESCENDING) != args.reverse)
    remarks = []
    if args.best:
        rows, remark = _ranked(rows, args.best, args.mode, args.reverse)
        remarks.append(remark)
    elif args.mode:
        raise UserError(f"--mode {args.mode} says which value of --best METRIC is best; name that metric")
    whole = len(rows)
    limit = args.limit or (whole if args.csv or args.json else SHOWN)
    rows = rows[:limit]
    if args.json:
        print(printable(json.dumps([_record(row) for row in rows], indent=2, allow_nan=False)))
    elif args.csv:
        _write_csv(rows, args.csv)
    else:
        if whole > limit:
            remarks.append(f"{whole - limit:,} more; --limit {whole} shows all")
        print_table(rows, metrics, remarks)
    return 0


def _ranked(rows: Sequence[ListedRun], metric: str, mode: "Mode | None", reverse: bool) -> tuple[list[ListedRun], str]:
    """The runs that have the metric, best first, and a sentence on what counts as best."""
    from lightspan.cli.runs.direction import mode_of
    from lightspan.cli.runs.metrics import last_values
    from lightspan.core.files.runs import METRICS
    from lightspan.core.spelling import nearest

    if rows and not any(metric in row.progress.values for row in rows):
        there = list(dict.fromkeys(name for row in rows for name in last_values(row.entry.folder / METRICS)))
        known = f"{nearest(metric, there)}they logged {', '.join(there) or 'nothing yet'}"
        raise UserError(f"--best {metric}: no run of {len(rows):,} logged it; {known}")
    chosen = mode_of(metric, mode, "--best")
    ranked = []
    for row in rows:
        values = row.progress.values.get(metric)
        value = None if values is None else values.lowest if chosen == "min" else values.highest
        if value is not None:
            ranked.append((value, row))
    if rows and not ranked:
        raise UserError(f"--best {metric}: none of these {len(rows):,} runs has a finite value of it")
    ranked.sort(key=lambda pair: pair[0], reverse=(chosen == "max") != reverse)
    why = "" if mode else ", judging by its name"
    left = f"; {len(rows) - len(ranked):,} runs without it are left out" if len(ranked) < len(rows) else ""
    return [row for _, row in ranked], f"best: the {'lowest' if chosen == 'min' else 'highest'} {metric}{why}{left}"


def _record(row: ListedRun) -> dict[str, Any]:
    entry, progress = row.entry, row.progress
    return {
        "run": str(entry.folder),
        "recipe": entry.recipe,
        "changes": shlex.join(entry.changes),
        "status": str(entry.status),
        "reason": entry.reason,
        "step": progress.steps,
        "seconds": progress.seconds,
        "started": entry.started and entry.started.isoformat(timespec="seconds"),
        "host": entry.host,
        "tags": list(entry.tags),
        "note": entry.note,
        "metrics": {
            name: {"last": values.last, "lowest": values.lowest, "highest": values.highest}
            for name, values in progress.values.items()
        },
    }


def _write_csv(rows: Sequence[ListedRun], path: Path) -> None:
    """One line a run; each metric has three columns."""
    from lightspan.core.files.atomic import write_atomic

    flat = []
    for row in rows:
        record = _record(row)
        metrics = record.pop("metrics")
        record["tags"] = " ".join(record["tags"])
        flat.append(record | {f"{name} {of}": value for name, has in metrics.items() for of, value in has.items()})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for one in flat for key in one)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    if str(path) == "-":
        sys.stdout.write(printable(text.getvalue()))
    else:  # names of files need not be text
        write_atomic(path, text.getvalue().encode("utf-8", "backslashreplace"), setting="--csv")
        print(printable(f"wrote {path}: {len(rows):,} runs"))
