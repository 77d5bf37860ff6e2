"""Arguments that several verbs share."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightspan.cli.config.places import RUN
from lightspan.cli.config.resolve import TRAINED, Resolved, resolve
from lightspan.core.errors import UserError

IMAGE_SIZE = 64  # of --images, in pixels
REPLACING = ("--images", "--volumes", "--videos", "--points", "--graphs", "--recordings", "--table")
DATA_OPTIONS = (*REPLACING, "--image-size", "--target")
"""Options that replace a recipe's data with the user's own; each takes a value."""


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """RECIPE, overlays, flags and --allow-module, as `args.recipe`, `.overlays`, `.flags` and `.allow_modules`.

    Flags are taken out of the command line before argparse sees it, so they may be anywhere.
    """
    parser.add_argument("recipe", metavar="RECIPE", help="a name that `lightspan recipes` lists, or a .yaml file")
    parser.add_argument(
        "-c",
        "--config",
        dest="overlays",
        action="append",
        default=[],
        metavar="OVERLAY",
        help="a .yaml file or a scale/NAME laid over the recipe; repeat it, later wins",
    )
    add_allow_module_argument(parser)
    parser.set_defaults(flags=[])
    parser.epilog = (
        "Flags: key.path=value, --key.path=value or --key.path value, anywhere on the line; they override recipe and "
        "overlays. Example: trainer.max_steps=200 model.init_args.optimizer.init_args.lr=1e-3"
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """--images FOLDER and --image-size PIXELS, --volumes, --videos, --points, --graphs or --recordings FOLDER, or
    --table FILE and --target COLUMN, which `resolved_from` lays over the recipe.
    """
    parser.add_argument(
        "--images",
        type=folder,
        metavar="FOLDER",
        help="the pictures in this folder instead of the recipe's data; training ends with a report of the features",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help=f"height and width at which --images are read (default: {IMAGE_SIZE})",
    )
    parser.add_argument(
        "--volumes",
        type=folder,
        metavar="FOLDER",
        help="the NIfTI files and DICOM series in this folder instead of the recipe's data",
    )
    parser.add_argument(
        "--videos",
        type=folder,
        metavar="FOLDER",
        help="the videos in this folder instead of the recipe's data",
    )
    parser.add_argument(
        "--points",
        type=folder,
        metavar="FOLDER",
        help="the PLY, OBJ, STL, OFF, LAS, LAZ and LDraw files in this folder instead of the recipe's data",
    )
    parser.add_argument(
        "--graphs",
        type=folder,
        metavar="FOLDER",
        help="the graphs, or the molecules as SMILES or SDF, in this folder instead of the recipe's data",
    )
    parser.add_argument(
        "--recordings",
        type=folder,
        metavar="FOLDER",
        help="the WAV, FLAC, OGG and MP3 files in this folder instead of the recipe's data",
    )
    parser.add_argument(
        "--table",
        type=file,
        metavar="FILE",
        help="the rows of this CSV or Parquet file instead of the recipe's data",
    )
    parser.add_argument("--target", metavar="COLUMN", help="the column of --table that is predicted")


def resolved_from(args: argparse.Namespace, kinds: Sequence[str] = TRAINED) -> Resolved:
    """The recipe of a command line with its overlays, the user's data (one of `REPLACING`), and flags, in this order.

    Args:
        kinds: of recipes that the verb can use.
    Raises: UserError as `lightspan.cli.config.resolve.resolve`, for data that a recipe cannot use, for two of them, and
        for an --image-size without --images or a --target without --table.
    """
    if args.images is None and args.image_size is not None:
        raise UserError("--image-size is the size of the pictures of --images FOLDER, which is not given")
    if args.table is None and args.target is not None:
        raise UserError("--target is a column of --table FILE, which is not given")
    given = [option for option in REPLACING if option_value(args, option) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each replace the recipe's data; give one of them")
    common: Any = args.flags, args.allow_modules, kinds
    if args.table is not None:
        from lightspan.cli.config.user_tables import with_table

        return with_table(args.recipe, args.overlays, args.table, args.target, *common)
    if args.volumes is not None:
        from lightspan.cli.config.user_volumes import with_volumes

        return with_volumes(args.recipe, args.overlays, args.volumes, *common)
    if args.images is not None:
        from lightspan.cli.config.user_images import with_images

        size = IMAGE_SIZE if args.image_size is None else args.image_size
        return with_images(args.recipe, args.overlays, args.images, size, *common)
    from lightspan.cli.config.user_files import USER_FILES, with_files

    for own in USER_FILES:
        if (place := option_value(args, own.option)) is not None:
            return with_files(own, args.recipe, args.overlays, place, *common)
    return resolve(args.recipe, args.overlays, *common)


def configuration_words(args: argparse.Namespace) -> list[str]:
    """What another command line needs after RECIPE for the same configuration, besides --allow-module."""
    overlays = [word for overlay in args.overlays for word in ("-c", overlay)]
    given = [(option, option_value(args, option)) for option in DATA_OPTIONS]
    data = [word for option, value in given if value is not None for word in (option, str(value))]
    return [*overlays, *data, *args.flags]


def option_value(args: argparse.Namespace, option: str) -> Any:
    """What argparse read for an option such as "--image-size"."""
    return getattr(args, option.removeprefix("--").replace("-", "_"))


def add_allow_module_argument(parser: argparse.ArgumentParser) -> None:
    """--allow-module PACKAGE, any number of times, as `args.allow_modules`."""
    parser.add_argument(
        "--allow-module",
        dest="allow_modules",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="your own package that the configuration may name; it is recorded with the run",
    )


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """--run DIR, as `args.run`; None if it is not given."""
    parser.add_argument("--run", type=folder, metavar="DIR", help="run folder (default: runs/RECIPE/TIME)")


def add_run_queue_arguments(parser: argparse.ArgumentParser) -> None:
    """--seed-key and --workers, of every verb that starts several runs."""
    parser.add_argument(
        "--seed-key",
        dest="seed_keys",
        action="append",
        default=[],
        metavar="KEY",
        help="another key that takes each seed, such as data.init_args.seed; repeat it",
    )
    parser.add_argument("--workers", type=count, metavar="N", help="runs at the same time (default 1)")


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """--seeds, --seed-key, --workers and --retry-failed, which `lightspan fit` has too."""
    parser.add_argument("--seeds", metavar="0,1,2", help="one run for each of these seeds (seed_everything)")
    add_run_queue_arguments(parser)
    parser.add_argument(
        "--retry-failed", action="store_true", help="when it is continued, also start the runs again that failed"
    )


def count(text: str) -> int:
    """The type of an option that counts something."""
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def folder(text: str) -> Path:
    """The type of an option that names a folder; the empty text, which an unset shell variable leaves, is refused."""
    return _place(text, "folder")


def file(text: str) -> Path:
    """The type of an option that names a file, like `folder`; a checkpoint may be either."""
    return _place(text, "file")


def _place(text: str, kind: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"the name of the {kind} is empty; is a shell variable not set?")
    if RUN in text:
        raise argparse.ArgumentTypeError(
            f"{RUN} stands for the folder of the run, here as in a recipe; rename {text!r}"
        )
    try:
        Path(text).exists()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} cannot name a {kind}: {error.strerror}") from error
    return Path(text)
