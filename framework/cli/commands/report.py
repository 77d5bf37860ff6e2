"""`lightspan report RUN...`: one HTML page that compares runs, and the same table on the console."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspan.cli.commands.arguments import file, folder
from lightspan.core.errors import UserError, print_notes, printable
from lightspan.core.files.runs import METRICS, REPORT, SUMMARY

if TYPE_CHECKING:
    from lightspan.cli.report.ranking import Ranking
    from lightspan.cli.report.runs import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        type=folder,
        help="run folder, or the folder of a sweep; the others are compared with the first one",
    )
    add_ranking_arguments(parser)
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


def add_ranking_arguments(parser: argparse.ArgumentParser) -> None:
    """--metric, --mode and --no-fold, of the verbs that show a report."""
    parser.add_argument(
        "--metric", metavar="NAME", help="rank the runs by it (default: the sweep's, or validation loss)"
    )
    parser.add_argument("--mode", choices=("min", "max"), help="whether low or high is good (default: by its name)")
    parser.add_argument(
        "--no-fold", dest="fold", action="store_false", help="show runs that differ by their seed alone one by one"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page and summary.json beside it. Raises: UserError for what is not a run or cannot be written."""
    from lightspan.cli.report.compare import FEW, caution
    from lightspan.cli.report.picture import picture
    from lightspan.cli.report.shown import shown
    from lightspan.core.files.atomic import write_atomic

    page = args.out if args.out.suffix in (".html", ".htm") else args.out / REPORT
    if (page.parent / METRICS).exists():
        raise UserError(
            f"--out {str(args.out)!r} would overwrite summary.json of run folder {str(page.parent)!r}, the run's "
            f"own; name another folder, for example --out {page.parent / 'report'}"
        )
    found = shown(args.runs, args.title, args.fold, args.metric, args.mode)
    runs, title = found.runs, found.title
    files: dict[Path, str | bytes] = {page: found.page(), page.parent / SUMMARY: summary_json(runs)}
    if args.png:
        files[args.png] = picture(runs, title)
    for path, content in files.items():
        write_atomic(path, content, setting="--png" if path == args.png else "--out")
    ranking = found.ranking() if len(runs) > FEW else None
    if ranking is None:
        _print_table(runs, title)
    else:
        _print_ranking(ranking, title)
    if said := caution(runs):
        print_notes([said])
    print(printable(" ".join(["wrote", *map(str, files)])))
    return 0


def summary_json(runs: Sequence["Run"]) -> str:
    """{run name: its summary}; values that are not finite become null, since JSON cannot express them."""
    table = {run.name: _finite_or_none(run.summary) for run in runs}
    return json.dumps(table, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _finite_or_none(value: Any) -> Any:
    """Also inside of what others wrote into a summary, at any of the few levels that are read."""
    if isinstance(value, dict):
        return {key: _finite_or_none(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_finite_or_none(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(runs: Sequence["Run"], title: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from lightspan.cli.report.compare import compare
    from lightspan.core.console import SafeConsole

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
    SafeConsole().print(table)


def _print_ranking(ranking: "Ranking", title: str) -> None:
    """The runs below each other, best first, with the settings in which they differ."""
    from rich.table import Table
    from rich.text import Text

    from lightspan.cli.report.ranking import settings_of
    from lightspan.core.console import SafeConsole

    settings, _ = settings_of(ranking)
    table = Table(title=Text(title), title_justify="left", caption_justify="left")
    heads = ["run", *(setting.name for setting in settings), ranking.metric]
    for at, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if at else "left", overflow="fold", no_wrap=at == len(heads) - 1)
    for at, place in enumerate(ranking.places):
        cells = [place.run.name, *(setting.values[at] for setting in settings)]
        table.add_row(*map(Text, map(printable, cells)), Text(place.text(), style="" if at else "bold green"))
    table.caption = Text(f"by the last value of {ranking.metric} of runs that have ended, the {ranking.first} first")
    SafeConsole().print(table)
