"""`lightspan list KIND`: optimisers, methods or recipes with one line each."""

import argparse

from lightspan import methods, optim
from lightspan.cli.commands import recipes
from lightspan.core.errors import UserError

KINDS = {"optimizers": optim.list, "methods": methods.list}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=(*KINDS, "recipes"), metavar="KIND", help=f"{', '.join(KINDS)} or recipes")
    parser.add_argument(
        "word", nargs="?", metavar="WORD", help="only those with this word in their name or description"
    )
    parser.epilog = (
        "In Python: lightspan.optim.create(NAME, model, lr=...), lightspan.methods.create(NAME, backbone=...)."
    )


def run(args: argparse.Namespace) -> int:
    """Raises: UserError for a word that none of them has."""
    if args.kind == "recipes":
        return recipes.run(argparse.Namespace(word=args.word, family=None, modality=None))
    rows = [entry for entry in KINDS[args.kind]() if args.word is None or args.word.lower() in " ".join(entry).lower()]
    if not rows:
        raise UserError(
            f"none of the {args.kind} has {args.word!r} in its name or description; `lightspan list {args.kind}` lists "
            "all of them"
        )
    recipes.print_table(("name", "summary", "paper", "class_path"), rows)
    return 0
