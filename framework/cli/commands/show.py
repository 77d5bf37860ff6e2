"""`lightspan show RECIPE`: a recipe as written, or merged, or where a key comes from; or the file of a selection."""

import argparse
from pathlib import Path

from lightspan.cli.commands.arguments import add_recipe_arguments
from lightspan.cli.config import recipes
from lightspan.cli.config.merge import explain
from lightspan.cli.config.resolve import ANY_KIND, merged, resolve
from lightspan.cli.config.tree import dotted, dump, walk
from lightspan.core.errors import UserError, print_notes, printable
from lightspan.core.files.runs import TENSORS
from lightspan.core.spelling import nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--resolved", action="store_true", help="the merged configuration, as a run would use it")
    parser.add_argument("--why", metavar="KEY", help="which file, line or flag set KEY, and what it replaced")


def run(args: argparse.Namespace) -> int:
    if args.recipe.endswith(".safetensors") or (Path(args.recipe).expanduser() / TENSORS).is_file():
        return _show_selection(args)
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
        print(printable(dump(resolved.document())), end="")
        return 0
    if args.overlays or args.flags:
        raise UserError("show prints the recipe file as it is; add --resolved to see it with overlays and flags")
    recipe = recipes.load(args.recipe)
    print(printable(recipe.name))
    for key, value in recipe.about.items():
        print(printable(f"  {key:<10} {value}"))
    print(printable(f"  {'file':<10} {recipes.label(recipe.path)}\n"))
    print(printable(recipe.path.read_text(encoding="utf-8")), end="")
    return 0


def _show_selection(args: argparse.Namespace) -> int:
    """What a file says of the samples that a run sees."""
    if args.resolved or args.why is not None or args.overlays or args.flags:
        raise UserError(f"{args.recipe} is no recipe, which alone --resolved, --why, overlays and flags are for")
    from lightspan.datamodules.loading.selection import DataSelection

    for name, text in DataSelection.read(args.recipe).described().items():
        print(printable(f"{name:<24} {text}"))
    return 0
