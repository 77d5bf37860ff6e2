"""`lightspan merge A B C --base BASE --method ties --out DIR`: a merger's recipe on checkpoints of the command line."""

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from lightspan.cli.commands.arguments import add_allow_module_argument, folder
from lightspan.cli.config.resolve import merged, resolve
from lightspan.cli.config.tree import dump
from lightspan.core.errors import UserError, print_notes, printable

FAMILY = "merging"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CKPT",
        help="what is merged: Hugging Face folders, safetensors files, PEFT adapters, run folders or .ckpt files",
    )
    parser.add_argument("--base", metavar="CKPT", help="what they were trained from, for methods and adapters that ask")
    parser.add_argument(
        "--method",
        required=True,
        metavar="RECIPE",
        help=f"a recipe of the family {FAMILY}, such as average, slerp, ties or dare, or a .yaml file with a merger",
    )
    parser.add_argument("--out", type=folder, required=True, metavar="DIR", help="folder to write; new or empty")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the merger, over the recipe's: density=0.3, coefficients.init_args.scale=0.5; repeat it",
    )
    add_allow_module_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Raises: UserError for whatever the user can mend, before anything is written."""
    recipe = args.method if args.method.endswith((".yaml", ".yml")) or "/" in args.method else f"{FAMILY}/{args.method}"
    flags = [f"merger.init_args.{setting}" for setting in args.settings]
    if "checkpoints" not in merged(recipe, (), ())[1].value:
        flags.append(f"checkpoints={json.dumps(named(args.checkpoints, None))}")
    resolved = resolve(recipe, (), flags, args.allow_modules, ("merger",))
    print_notes(resolved.notes)

    from lightspan.cli.config.build import build_parts
    from lightspan.merging.adapted import open_checkpoints
    from lightspan.merging.product import refuse_occupied, write_product
    from lightspan.merging.weights import is_adapter, place_of

    refuse_occupied(args.out)
    merger = build_parts(resolved)["merger"]
    paths = named(args.checkpoints, merger.base)
    print_notes(duplicate_notes(paths))
    if merger.base is not None:
        if args.base is None:
            raise UserError(f"--method {args.method} needs --base, the checkpoint that the others were trained from")
        paths = {merger.base: args.base, **paths}
    elif args.base is not None and not any(is_adapter(place_of(path)) for path in args.checkpoints):
        raise UserError(f"--method {args.method} asks for no base, and no adapter needs one; leave --base out")
    checkpoints = open_checkpoints(merger, paths, None if merger.base is not None else args.base)
    resolved = dataclasses.replace(resolved, config={**resolved.config, "checkpoints": paths})
    record = {"recipe": resolved.name, "configuration": dump(resolved.config)}
    settings = resolved.config["merger"]
    result = write_product(merger, checkpoints, args.out, record, args.method, settings)
    for figure in result.figures():
        print(printable(f"{figure.name:<32} {figure.value:,.6g} {figure.unit}".rstrip()))
    print(printable(f"wrote {args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}"))
    return 0


def duplicate_notes(paths: Mapping[str, str]) -> list[str]:
    """A note on each path that is given again, and on each that got a name other than its own."""
    notes = []
    for name, path in paths.items():
        first = next(other for other in paths if os.path.realpath(paths[other]) == os.path.realpath(path))
        if first != name:
            notes.append(f"{path} is given twice, and counts twice: as {first} and as {name}")
        elif name != _stem(path):
            notes.append(f"{path} is called {name}, since another checkpoint has the name {_stem(path)}")
    return notes


def _stem(path: str) -> str:
    # A dot would be read as a step down in `--set coefficients.init_args.of_tasks.NAME=1`.
    return Path(path).name.removesuffix(".safetensors").removesuffix(".ckpt").replace(".", "_") or "checkpoint"


def named(paths: list[str], taken: str | None) -> dict[str, str]:
    """Paths by short names of their own: the last part of each, numbered where two are equal or `taken`."""
    found: dict[str, str] = {}
    for path in paths:
        stem, number = _stem(path), 1
        while (name := stem if number == 1 else f"{stem}-{number}") in found or name == taken:
            number += 1
        found[name] = path
    return found
