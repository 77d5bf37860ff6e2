"""`lightspan recipes`: the catalogue as a table."""

import argparse
import sys
from typing import Any

from lightspan.cli.config import recipes
from lightspan.cli.config.problems import nearest
from lightspan.core.errors import UserError, printable


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
    print_table(rows)
    return 0


def print_table(rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Recipes as a table; tab-separated lines if the output is not a terminal, so that other tools can read them."""
    columns = ("family", "modality", "paper", "evidence")
    if not sys.stdout.isatty():
        print(printable("\t".join(("name", *columns))))
        for name, about in rows:
            print(printable("\t".join((name, *(str(about.get(column, "")) for column in columns)))))
        return
    from rich.table import Table

    from lightspan.core.console import SafeConsole

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", *columns):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for name, about in rows:
        table.add_row(f"[cyan]{name}[/cyan]", *(str(about.get(column, "")) for column in columns))
    SafeConsole().print(table)
    print("\nlightspan show NAME says more, lightspan fit NAME trains one; lightspan run NAME if it does not train.")
