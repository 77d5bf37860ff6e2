"""`lightspan check RECIPE`: every mistake before a run: names, types and ranges without torch, then from shapes alone
whether the parts fit together. Weights and data need not be here yet: what is missing is named, and the rest checked.
"""

import argparse
import os
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspan.cli.commands.arguments import REPLACING, add_data_arguments, add_recipe_arguments, resolved_from
from lightspan.cli.config.blame import first_user_error
from lightspan.cli.config.estimator_inputs import of_files
from lightspan.cli.config.places import places
from lightspan.cli.config.recipes import stand_ins
from lightspan.cli.config.resolve import ANY_KIND, TRAINED, Resolved, refuse
from lightspan.cli.config.signatures import member
from lightspan.cli.config.tree import COMMAND_LINE, dotted
from lightspan.core.absent import MissingFile, without_missing_weights
from lightspan.core.errors import UserError, one_line, print_notes, printable
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import PathUse
from lightspan.datamodules.shards.fetch import expand_braces

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightspan.cli.config.user_files import UserFiles

MOST_NAMED = 5
"""Damaged files in one message."""
MOST_FILES = 500
"""Videos, clouds, graphs or recordings that are looked at: a video takes as long as reading its file, a cloud or a
graph tens of milliseconds.
"""
MOST_VOLUMES = 2_000
"""Subjects whose headers are read: each file of one takes a few milliseconds of a core."""
Damaged = Callable[[Path, dict[str, Any]], tuple[list[str], int, int]]
"""Of a folder under the settings of its data, see `_damaged_pictures`."""
GRAPH_FOLDER = "lightspan.datamodules.graph.folder.GraphFolder"
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
    damage, skipped = _damaged_files(data), (data.get("init_args") or {}).get("skip_damaged")
    damaged = [f"{one}; {WAY_OUT}" for one in damage if not skipped]
    refuse([*problems, *_lacking_attributes(resolved.config), *damaged], resolved.name)
    print_notes([*resolved.notes, *notes, *damage, *_absent(resolved)])
    flags = sum(place in (COMMAND_LINE, *REPLACING) for place in resolved.sources.values())
    said = f"{resolved.name}: no problems in {len(resolved.sources)} settings, {flags} of them from the command line"
    print(printable(said), flush=True)  # what follows takes seconds
    if resolved.kind in TRAINED and not args.fast:
        print(printable(_parts(resolved)))
    return 0


def _parts(resolved: Resolved) -> str:
    """Builds model and data without numbers. Raises: UserError, as `lightspan fit`, for parts that do not fit."""
    if find_spec("torch") is None:
        return "torch is not installed here, so nothing was built, and whether the parts fit together is not known"
    from lightspan.cli.planning.one_process import in_one_process
    from lightspan.cli.planning.rehearsal import without_trace
    from lightspan.cli.planning.shapes import on_meta_first

    with without_trace(in_one_process(resolved)) as (alone, scratch), without_missing_weights():
        try:
            model = on_meta_first(alone, lambda built: built.model, scratch)
        except MissingFile:
            return _each_by_itself(alone, scratch)
    return f"its parts fit together: {_counted(model)}; fit --dry-run also tries a batch"


def _each_by_itself(alone: Resolved, scratch: Path) -> str:
    """Builds model and data without each other, so that a file which one of them lacks does not hide what is wrong
    with the other. Raises: UserError for whatever is wrong besides missing files.
    """
    from lightspan.cli.planning.rehearsal import with_small
    from lightspan.cli.planning.shapes import on_meta_first

    said = []
    for part, other in (("model", "data"), ("data", "model")):
        try:
            built = on_meta_first(with_small(alone, other), lambda built: built, scratch)
            said.append(_counted(built.model) if part == "model" else type(built.datamodule).__name__)
        except MissingFile as error:
            said.append(f"not checked beyond this: {first_user_error(error)}")
    overlays = stand_ins(alone.name)
    way = f"\n  with stand-ins for what is missing: add {overlays}" if overlays else ""
    return "whether its parts fit together is not known yet\n  model: {}\n  data: {}".format(*said) + way


def _counted(model: "LightningModule") -> str:
    return f"{type(model).__name__} with {sum(parameter.numel() for parameter in model.parameters()):,} parameters"


def _absent(resolved: Resolved) -> list[str]:
    """A note on the files and folders that the recipe reads and that are not here, if there are any."""
    missing: dict[str, str] = {}
    for path, node, use in places(resolved.located(), resolved.allow_modules):
        if use is PathUse.READ and "://" not in node.value and not _is_here(node.value):
            missing.setdefault(node.value, dotted(path))
    named = [f"{place} ({key})" for place, key in [*missing.items()][:MOST_NAMED]]
    named += [f"{len(missing) - MOST_NAMED} more"] if len(missing) > MOST_NAMED else []
    return [f"not here yet, so what they hold is not checked: {', '.join(named)}"] if named else []


def _is_here(place: str) -> bool:
    """Whether something is at the place, or at all those that a pattern such as {000..099} stands for."""
    return all(os.path.lexists(os.path.expanduser(one)) for one in expand_braces(place))


def _damaged_files(data: dict[str, Any]) -> list[str]:
    """What to say of damaged files in the folders of pictures and others that data name, if any."""
    from lightspan.cli.config import user_images, user_volumes
    from lightspan.cli.config.user_files import USER_FILES

    kinds = {
        user_images.DATA: ("pictures", _damaged_pictures),
        user_volumes.DATA: ("subjects", _damaged_volumes),
        **{own.data: (own.name, _damaged_files_of(own)) for own in USER_FILES},
    }
    if (kind := kinds.get(data.get("class_path", ""))) is None:
        return []
    (what, damaged), settings, said = kind, data.get("init_args") or {}, []
    for key in ("folder", "val_folder"):
        if not isinstance(given := settings.get(key), str):
            continue
        if not (folder := expanded(given, f"data.init_args.{key}")).is_dir():
            continue
        found, seen, count = damaged(folder, settings)
        if found:
            named = [one_line(line) for line in found[:MOST_NAMED]]
            named += [f"and {len(found) - MOST_NAMED:,} more"] if len(found) > MOST_NAMED else []
            counted = f"{len(found):,} of {seen:,} {what}"
            counted += "" if seen == count else f" that were looked at, of {count:,},"
            said.append(f"data.init_args.{key}: {counted} cannot be read: {', '.join(named)}")
    return said


def _lacking_attributes(config: dict[str, Any]) -> list[str]:
    """What to say of attributes that a folder of graphs is asked for and none of its nodes has. Nothing where there are
    more than `MOST_FILES`, as another file may have them, or molecules, whose atoms have kinds.
    """
    data = config.get("data") or {}
    settings = data.get("init_args") or {}
    if data.get("class_path") != GRAPH_FOLDER or not isinstance(given := settings.get("folder"), str):
        return []
    if not (folder := expanded(given, "data.init_args.folder")).is_dir():
        return []
    from lightspan.datamodules.graph.reading import (
        GRAPHS,
        GraphReader,
        is_of_molecules,
        require_kinds,
        require_numbers_of_nodes,
    )
    from lightspan.datamodules.image.picture_files import find_labelled

    paths = [folder / name for name in find_labelled(folder, GRAPHS, settings.get("links", "skip"), "none").names]
    if len(paths) > MOST_FILES or any(map(is_of_molecules, paths)):
        return []
    kind, numbers, said = settings.get("kind", "kind"), settings.get("numbers") or (), list[str]()
    reader = GraphReader(kind, (), False)
    for path in paths:
        with suppress(ValueError, OSError):  # damage, which is named elsewhere
            list(reader.read(path))
    method = config["model"]["class_path"] if config.get("model") else ""
    try:
        require_numbers_of_nodes(numbers, reader.attributes, folder)
        if method and member(method, "reads_kinds") is not None:
            require_kinds(method.rpartition(".")[2], kind, reader.words.number, reader.attributes, folder)
    except UserError as error:
        said.append(str(error))
    return said


def _damaged_pictures(folder: Path, settings: dict[str, Any]) -> tuple[list[str], int, int]:
    """(a line for each damaged file, how many were looked at, how many there are)."""
    from lightspan.datamodules.image.picture_files import find_pictures
    from lightspan.datamodules.shards.headers import damaged, looked_at

    names = find_pictures(folder, settings.get("links", "skip"), "none").names
    seen = [names[number] for number in looked_at(len(names))]
    return [f"{name} ({why})" for name, why in damaged(folder, seen).items()], len(seen), len(names)


def _damaged_volumes(folder: Path, settings: dict[str, Any]) -> tuple[list[str], int, int]:
    """As `_damaged_pictures`, of subjects, by the headers of their files."""
    from lightspan.datamodules.shards.headers import looked_at
    from lightspan.datamodules.volume.subjects import ALL, Unreadable, find_subjects

    patterns = settings.get("modalities") or ALL, settings.get("segmentation"), settings.get("links", "skip")
    subjects, said = find_subjects(folder, *patterns).subjects, []
    seen = looked_at(len(subjects), MOST_VOLUMES)
    for number in seen:
        try:
            subjects[number].grid(folder)
        except Unreadable as error:
            said.append(str(error))
    return said, len(seen), len(subjects)


def _damaged_files_of(own: "UserFiles") -> Damaged:
    """As `_damaged_pictures`, of files of which each is looked at by the reader of its kind."""

    def damaged(folder: Path, settings: dict[str, Any]) -> tuple[list[str], int, int]:
        from lightspan.cli.any_folder.survey import few
        from lightspan.datamodules.image.picture_files import find_labelled
        from lightspan.datamodules.shards.headers import looked_at

        names, said = find_labelled(folder, own.kind(), settings.get("links", "skip"), "none").names, list[str]()
        seen, look = looked_at(len(names), MOST_FILES), own.look(folder, settings)
        for number in seen:
            try:
                if faults := look(names[number]).faults:
                    said.append(few(faults))  # a file of many molecules is one file
            except UserError:  # of this machine, not of the file
                raise
            except (ValueError, OSError) as error:
                said.append(f"{names[number]} ({error})")
        return said, len(seen), len(names)

    return damaged
