"""`lightspan recipes`: the catalogue as a table."""

import argparse
import sys
from collections.abc import Iterable, Sequence

from lightspan.cli.config import recipes
from lightspan.core.errors import UserError, printable
from lightspan.core.spelling import nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "word", nargs="?", metavar="WORD", help="only recipes with this word in their name or description"
    )
    parser.add_argument("--family", metavar="F", help="only recipes of this family, such as language")
    parser.add_argument("--modality", metavar="M", help="only recipes for this kind of data, such as text")


def run(args: argparse.Namespace) -> int:
    rows = [(name, recipes.load(name).about) for name in recipes.catalogue_names()]
    for key in ("family", "modality"):
        wanted = getattr(args, key)
        known = sorted({str(about.get(key)) for _, about in rows})
        if wanted is not None and wanted not in known:
            raise UserError(
                f"no recipe has the {key} {wanted!r}; {nearest(wanted, known)}there are: {', '.join(known)}"
            )
        rows = [(name, about) for name, about in rows if wanted is None or about.get(key) == wanted]
    if args.word is not None:
        rows = [(name, about) for name, about in rows if args.word.lower() in f"{name} {about}".lower()]
        if not rows:
            raise UserError(f"no recipe has {args.word!r} in its name or description; `lightspan recipes` lists all")
    columns = ("family", "modality", "paper", "evidence")
    print_table(("name", *columns), [(name, *(str(about.get(key, "")) for key in columns)) for name, about in rows])
    if sys.stdout.isatty():
        print(
            "\nlightspan show NAME says more, lightspan fit NAME trains one; lightspan run NAME if it does not train."
        )
    return 0


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose first column is a name; tab-separated lines if the output is not a terminal, so that other tools
    can read them.
    """
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            print(printable("\t".join(row)))
        return
    from rich.markup import escape
    from rich.table import Table

    from lightspan.core.console import SafeConsole

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for name, *rest in rows:
        table.add_row(f"[cyan]{escape(name)}[/cyan]", *map(escape, rest))
    SafeConsole().print(table)
