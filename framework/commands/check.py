"""`lightspan check RECIPE`: every mistake before a run: names, types and ranges without torch, then from shapes alone
whether the parts fit together.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightspan.commands.arguments import add_data_arguments, add_recipe_arguments, resolved_from
from lightspan.config.estimator_inputs import of_files
from lightspan.config.resolve import ANY_KIND, TRAINED, Resolved, refuse
from lightspan.config.tree import COMMAND_LINE
from lightspan.errors import one_line, print_notes, printable

MOST_NAMED = 5
"""Damaged pictures in one message."""
WAY_OUT = "repair or remove them, or train without them with data.init_args.skip_damaged=true"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument(
        "--fast",
        action="store_true",
        help="names, types and ranges only: answers at once, since it builds nothing and loads no torch",
    )


def run(args: argparse.Namespace) -> int:
    resolved = resolved_from(args, ANY_KIND)
    problems, notes = of_files(resolved.tree)
    data = resolved.config.get("data") or {}
    damage, skipped = _damaged_pictures(data), (data.get("init_args") or {}).get("skip_damaged")
    refuse([*problems, *(f"{one}; {WAY_OUT}" for one in damage if not skipped)], resolved.name)
    print_notes([*resolved.notes, *notes, *damage])
    flags = sum(place == COMMAND_LINE for place in resolved.sources.values())
    said = f"{resolved.name}: no problems in {len(resolved.sources)} settings, {flags} of them from the command line"
    print(printable(said), flush=True)  # what follows takes seconds
    if resolved.kind in TRAINED and not args.fast:
        print(printable(_parts(resolved)))
    return 0


def _parts(resolved: Resolved) -> str:
    """Builds model and data without numbers. Raises: UserError, as `lightspan fit`, for parts that do not fit."""
    if find_spec("torch") is None:
        return "torch is not installed here, so nothing was built, and whether the parts fit together is not known"
    from lightspan.planning.one_process import in_one_process
    from lightspan.planning.rehearsal import without_trace
    from lightspan.planning.shapes import on_shapes_first

    with without_trace(in_one_process(resolved)) as (alone, scratch):
        model = on_shapes_first(alone, lambda built: built.model, scratch)
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"its parts fit together: {type(model).__name__} with {total:,} parameters; fit --dry-run also tries a batch"


def _damaged_pictures(data: dict[str, Any]) -> list[str]:
    """What to say of damaged files in the folders of pictures that the data name; nothing of other data."""
    from lightspan.config.own_pictures import DATA

    if data.get("class_path") != DATA:
        return []
    from lightspan.datamodules.pictures.files import find_pictures
    from lightspan.datamodules.shards.headers import damaged, looked_at

    settings, said = data.get("init_args") or {}, []
    for key in ("folder", "val_folder"):
        if not (isinstance(settings.get(key), str) and (folder := Path(settings[key]).expanduser()).is_dir()):
            continue
        names = find_pictures(folder, settings.get("links", "skip"), "none").names
        seen = [names[number] for number in looked_at(len(names))]
        if found := damaged(folder, seen):
            named = [f"{one_line(name)} ({one_line(why)})" for name, why in [*found.items()][:MOST_NAMED]]
            named += [f"and {len(found) - MOST_NAMED:,} more"] if len(found) > MOST_NAMED else []
            counted = f"{len(found):,} of {len(seen):,} pictures"
            counted += "" if len(seen) == len(names) else f" that were looked at, of {len(names):,},"
            said.append(f"data.init_args.{key}: {counted} cannot be read: {', '.join(named)}")
    return said
