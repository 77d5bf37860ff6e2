"""`lightspan runs clean [DIR...]`: shows which runs it would delete and what that frees, and asks."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lightspan.cli.commands.asking import agreed
from lightspan.cli.commands.runs import add_filter_arguments, filter_from
from lightspan.core.errors import UserError, one_line, printable

if TYPE_CHECKING:
    from lightspan.cli.runs.cleaning import Deletable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_filter_arguments(parser)
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    parser.epilog = (
        "Without --status it means runs that failed, that stopped writing and did not say why, and that never "
        "started. Runs with a tag stay unless --tag names one of theirs; a run that is running stays in any case."
    )


def run(args: argparse.Namespace) -> int:
    """Deletes the selected runs after a yes. Exit status 0, or 1 if one of them could not be deleted.

    Raises: UserError as `lightspan runs`, and where nobody can be asked.
    """
    from lightspan.cli.runs.catalogue import find_runs, read_entry
    from lightspan.cli.runs.cleaning import USELESS, look

    chosen = filter_from(args)
    if not chosen.statuses:
        chosen = replace(chosen, statuses=USELESS)
    entries = [entry for folder in find_runs(args.dirs) if chosen.has(entry := read_entry(folder))]
    deletable, kept = look(entries, with_tags=bool(args.tag))
    for one in kept:
        print(one_line(f"keeps {one.entry.folder}: {one.reason}"))
    if not deletable:
        print("nothing to delete")
        return 0
    for run in deletable:
        print(one_line(f"{run.entry.status:<10} {size_text(run.size):>10}  {run.entry.folder}"))
    question = f"delete {_runs(len(deletable))}, {size_text(sum(run.size for run in deletable))}?"
    if not args.yes and not agreed(question):
        print("nothing was deleted")
        return 0
    return _delete(deletable)


def _delete(deletable: Sequence["Deletable"]) -> int:
    from lightspan.cli.runs.cleaning import delete

    failures = 0
    for run in deletable:
        try:
            delete(run)
        except UserError as error:
            failures += 1
            print(one_line(f"lightspan: {error}"), file=sys.stderr)
    print(printable(f"deleted {_runs(len(deletable) - failures)}"))
    return 1 if failures else 0


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count:,} runs"


def size_text(size: float) -> str:
    """Bytes as `812 B`, `3.4 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
