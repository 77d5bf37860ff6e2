"""`lightspan recipes`, `show`, `copy` and `check`: all that can be learned about a recipe without torch."""

import argparse
import sys
from pathlib import Path
from typing import Any

from lightspan.commands.arguments import add_recipe_arguments, file
from lightspan.config import recipes
from lightspan.config.check import kind_of
from lightspan.config.merge import explain
from lightspan.config.problems import nearest
from lightspan.config.resolve import ANY_KIND, merged, resolve, verb_for
from lightspan.config.tree import COMMAND_LINE, dotted, dump, plain, read, walk
from lightspan.errors import UserError, print_notes, printable


def add_recipes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", metavar="F", help="only recipes of this family, such as language")
    parser.add_argument("--modality", metavar="M", help="only recipes for this kind of data, such as text")


def run_recipes(args: argparse.Namespace) -> int:
    rows = [(name, recipes.load(name).about) for name in recipes.catalogue_names()]
    for key in ("family", "modality"):
        wanted = getattr(args, key)
        known = sorted({str(about.get(key)) for _, about in rows})
        if wanted is not None and wanted not in known:
            raise UserError(
                f"no recipe has the {key} {wanted!r}; {nearest(wanted, known)}there are: {', '.join(known)}"
            )
        rows = [(name, about) for name, about in rows if wanted is None or about.get(key) == wanted]
    print_table(rows)
    return 0


def print_table(rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Recipes as a table; tab-separated lines if the output is not a terminal, so that other tools can read them."""
    columns = ("family", "modality", "paper", "evidence")
    if not sys.stdout.isatty():
        print("\t".join(("name", *columns)))
        for name, about in rows:
            print(printable("\t".join((name, *(str(about.get(column, "")) for column in columns)))))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", *columns):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for name, about in rows:
        table.add_row(f"[cyan]{name}[/cyan]", *(str(about.get(column, "")) for column in columns))
    Console().print(table)
    print("\nlightspan show NAME says more, lightspan fit NAME trains one; lightspan run NAME if it does not train.")


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--resolved", action="store_true", help="the merged configuration, as a run would use it")
    parser.add_argument("--why", metavar="KEY", help="which file, line or flag set KEY, and what it replaced")


def run_show(args: argparse.Namespace) -> int:
    if args.why is not None:
        _, tree, _ = merged(args.recipe, args.overlays, args.flags)
        lines = explain(tree, tuple(int(key) if key.isdigit() else key for key in args.why.split(".")))
        if lines is None:
            known = [dotted(path) for path, _ in walk(tree) if path]
            raise UserError(f"no layer of {args.recipe} sets {args.why!r}; {nearest(args.why, known)}".rstrip("; "))
        print(printable("\n".join(lines)))
        return 0
    if args.resolved:
        resolved = resolve(args.recipe, args.overlays, args.flags, args.allow_modules, ANY_KIND)
        print_notes(resolved.notes)
        print(dump(resolved.document()), end="")
        return 0
    if args.overlays or args.flags:
        raise UserError("show prints the recipe file as it is; add --resolved to see it with overlays and flags")
    recipe = recipes.load(args.recipe)
    print(recipe.name)
    for key, value in recipe.about.items():
        print(printable(f"  {key:<10} {value}"))
    print(f"  {'file':<10} {recipes.label(recipe.path)}\n")
    print(recipe.path.read_text(encoding="utf-8"), end="")
    return 0


def add_copy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a name that `lightspan recipes` lists, or a .yaml file")
    parser.add_argument("file", metavar="FILE", type=file, help="where to write it: a new .yaml file")


def run_copy(args: argparse.Namespace) -> int:
    from lightspan.files import write_atomic

    source, target = recipes.find(args.recipe), args.file
    if target.suffix not in recipes.SUFFIXES:
        raise UserError(f"{target}: a recipe file ends in .yaml; write {target}.yaml")
    if target.exists():
        raise UserError(f"{target} exists; remove it or choose another name")
    text = source.read_text(encoding="utf-8")
    if bases := _relative_bases(source):
        raise UserError(
            f"{source} builds on {', '.join(bases)} in the same folder, which a copy elsewhere would not find"
        )
    verb = verb_for(kind_of(merged(args.recipe, (), ())[1].value))
    write_atomic(target, text, setting="another FILE")
    print(f"wrote {target}; edit it, then: lightspan check {target} && lightspan {verb} {target}")
    return 0


def _relative_bases(source: Path) -> list[str]:
    """Bases given as files, which a copy elsewhere would not find."""
    base = read(source, recipes.label(source)).child("base")
    values = plain(base) if base is not None else []
    names = values if isinstance(values, list) else [values]
    return [
        name
        for name in names
        if isinstance(name, str) and name.endswith(recipes.SUFFIXES) and not Path(name).is_absolute()
    ]


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)


def run_check(args: argparse.Namespace) -> int:
    resolved = resolve(args.recipe, args.overlays, args.flags, args.allow_modules, ANY_KIND)
    print_notes(resolved.notes)
    flags = sum(place == COMMAND_LINE for place in resolved.sources.values())
    print(f"{resolved.name}: no problems in {len(resolved.sources)} settings, {flags} of them from the command line")
    return 0
