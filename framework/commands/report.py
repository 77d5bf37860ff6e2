"""`lightspan report RUN...`: one HTML page that compares runs, and the same table on the console."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspan.commands.arguments import file, folder
from lightspan.errors import UserError, print_notes
from lightspan.run_files import METRICS, REPORT, SUMMARY

if TYPE_CHECKING:
    from lightspan.report.runs import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        type=folder,
        help="run folder; the others are compared with the first one",
    )
    parser.add_argument(
        "--out",
        type=folder,
        default=Path("report"),
        metavar="DIR_OR_FILE.html",
        help="folder or page (default: report/)",
    )
    parser.add_argument("--title", default=None, help="heading of the page (default: the names of the runs)")
    parser.add_argument(
        "--png", type=file, default=None, metavar="FILE", help="also draw the validation curves as a PNG"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page and summary.json beside it. Raises: UserError for what is not a run or cannot be written."""
    from lightspan.files import write_atomic
    from lightspan.report.page import render
    from lightspan.report.picture import picture
    from lightspan.report.runs import load_runs

    page = args.out if args.out.suffix in (".html", ".htm") else args.out / REPORT
    if (page.parent / METRICS).exists():
        raise UserError(
            f"--out {str(args.out)!r} would overwrite summary.json of run folder {str(page.parent)!r}, the run's "
            f"own; name another folder, for example --out {page.parent / 'report'}"
        )
    runs = load_runs(args.runs)
    title = args.title or " and ".join(run.name for run in runs)
    files: dict[Path, str | bytes] = {page: render(runs, title), page.parent / SUMMARY: summary_json(runs)}
    if args.png:
        files[args.png] = picture(runs, title)
    for path, content in files.items():
        write_atomic(path, content, setting="--png" if path == args.png else "--out")
    _print_table(runs, title)
    print(" ".join(["wrote", *map(str, files)]))
    return 0


def summary_json(runs: Sequence["Run"]) -> str:
    """{run name: its summary}; values that are not finite become null, since JSON cannot express them."""
    table = {run.name: {key: _finite_or_none(value) for key, value in run.summary.items()} for run in runs}
    return json.dumps(table, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(runs: Sequence["Run"], title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lightspan.report.compare import caution, compare

    table = Table(title=Text(title), title_justify="left", caption_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column(Text(run.name), justify="right")
    for row in compare(runs):
        label = f"{row.figure.label} ({row.figure.unit})" if row.figure.unit else row.figure.label
        cells = [
            Text(
                f"{cell.text}  {cell.relative}" if cell.relative else cell.text, style="bold green" if cell.best else ""
            )
            for cell in row.cells
        ]
        table.add_row(label, *cells)
    if len(runs) > 1:
        table.caption = Text(f"green: best; second figures: relative to {runs[0].name}")
    Console().print(table)
    if said := caution(runs):
        print_notes([said])
