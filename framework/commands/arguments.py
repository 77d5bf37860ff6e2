"""Arguments that several verbs share."""

import argparse
from pathlib import Path


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


def folder(text: str) -> Path:
    """The type of an option that names a folder; the empty text, which an unset shell variable leaves, is refused."""
    return _place(text, "folder")


def file(text: str) -> Path:
    """The type of an option that names a file, like `folder`; a checkpoint may be either."""
    return _place(text, "file")


def _place(text: str, kind: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"the name of the {kind} is empty; is a shell variable not set?")
    try:
        Path(text).exists()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} cannot name a {kind}: {error.strerror}") from error
    return Path(text)
