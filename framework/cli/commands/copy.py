"""`lightspan copy RECIPE FILE`: a recipe as a file of your own."""

import argparse
from pathlib import Path
from typing import Any

from lightspan.cli.commands.arguments import file
from lightspan.cli.config import recipes
from lightspan.cli.config.check import kind_of
from lightspan.cli.config.resolve import merged, verb_for
from lightspan.cli.config.tree import plain, read
from lightspan.core.errors import UserError, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a name that `lightspan recipes` lists, or a .yaml file")
    parser.add_argument("file", metavar="FILE", type=file, help="where to write it: a new .yaml file")


def run(args: argparse.Namespace) -> int:
    from lightspan.core.files.atomic import write_atomic

    source, target = recipes.find(args.recipe), args.file
    if target.suffix not in recipes.SUFFIXES:
        raise UserError(f"{target}: a recipe file ends in .yaml; write {target}.yaml")
    if target.exists():
        raise UserError(f"{target} exists; remove it or choose another name")
    text = source.read_text(encoding="utf-8")
    if files := _relative_bases(source):
        raise UserError(
            f"{source} builds on {', '.join(files)} in the same folder, which a copy elsewhere would not find"
        )
    kind = kind_of(merged(args.recipe, (), ())[1].value)
    write_atomic(target, text, setting="another FILE")
    print(printable(f"wrote {target}; edit it, then: lightspan check {target} && lightspan {verb_for(kind)} {target}"))
    bases = _bases(source)
    if bases and read(source, recipes.label(source)).at((kind, "class_path")) is None:
        print(
            printable(
                f"it holds only what differs from {', '.join(map(str, bases))}; all settings, which you can change in "
                f"it: lightspan show {target} --resolved"
            )
        )
    return 0


def _relative_bases(source: Path) -> list[str]:
    """Bases given as files, which a copy elsewhere would not find."""
    return [
        name
        for name in _bases(source)
        if isinstance(name, str) and name.endswith(recipes.SUFFIXES) and not Path(name).is_absolute()
    ]


def _bases(source: Path) -> list[Any]:
    """What a recipe is based on, as written."""
    base = read(source, recipes.label(source)).child("base")
    values = plain(base) if base is not None else []
    return values if isinstance(values, list) else [values]
