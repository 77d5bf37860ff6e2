"""`lightspan runs tag RUN WORD...` and `lightspan runs note RUN TEXT`: what people say about a run."""

import argparse
from pathlib import Path

from lightspan.cli.commands.arguments import folder
from lightspan.core.errors import UserError, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=folder, metavar="RUN", help="a run folder")
    parser.add_argument("words", nargs="*", metavar="WORD", help="what to add; without any, what there is is printed")
    parser.add_argument("--remove", action="store_true", help="remove the words instead; without any, remove all")


def run_tag(args: argparse.Namespace) -> int:
    """Adds tags, or removes them, and prints those that the run then has."""
    from lightspan.cli.runs.labels import set_tags, sole_labeller, tags_of

    run, words = _run_folder(args.run), set(args.words)
    with sole_labeller(run):
        before = set(tags_of(run))
        if args.remove and (absent := words - before):
            raise UserError(f"{run} has no tag {min(absent)!r}; its tags: {', '.join(sorted(before)) or 'none'}")
        after = (before - words if words else set()) if args.remove else before | words
        if after != before:
            set_tags(run, after)
    print(printable(" ".join(sorted(after)) or "no tags"))
    return 0


def run_note(args: argparse.Namespace) -> int:
    """Replaces the note on a run, removes it, or prints it."""
    from lightspan.cli.runs.labels import note_of, set_note

    run = _run_folder(args.run)
    if args.remove and args.words:
        raise UserError("a run has one note, and --remove takes no words; leave them out")
    if args.remove or args.words:
        set_note(run, " ".join(args.words))
    print(printable(note_of(run) or "no note"))
    return 0


def _run_folder(folder: Path) -> Path:
    from lightspan.cli.runs.catalogue import MARKS

    if not any((folder / mark).is_file() for mark in MARKS):
        raise UserError(f"{folder} is not a run folder; `lightspan runs DIR` lists those below a folder")
    return folder
