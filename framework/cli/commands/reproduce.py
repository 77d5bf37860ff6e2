"""`lightspan reproduce ROW`: measures a row of the evidence or of a benchmark again, against what is stored."""

import argparse
import subprocess
import sys
from pathlib import Path

from lightspan.cli.commands.arguments import folder
from lightspan.core.errors import UserError

SCRIPT = Path("evidence", "reproduce.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "row",
        metavar="ROW",
        help="a system of docs/evidence.md (20_mmc), a row of docs/representation.md (zoo/fashion/ViT/SimCLR) or of "
        "docs/comparison.md (quality/stdlib/factored_muon)",
    )
    parser.add_argument(
        "--checkout",
        type=folder,
        help="the clone of lightspan whose code and figures are meant (default: the one here)",
    )
    parser.add_argument("--out", type=Path, help="where the new record is kept (default: build/reproduce in the clone)")
    parser.epilog = (
        "Runs the code of the clone, with the seeds and settings that are stored. Exit status 1: a figure lies outside "
        "of the spread that its seeds had."
    )


def run(args: argparse.Namespace) -> int:
    """Raises: UserError outside of a clone."""
    here = Path.cwd()
    places = [args.checkout] if args.checkout else [here, *here.parents]
    root = next((place for place in places if (place / SCRIPT).is_file()), None)
    if root is None:
        raise UserError(
            f"{places[0]} is not inside a clone of lightspan, which holds the measurements; change to one, or give "
            "--checkout=FOLDER"
        )
    out = ["--out", str(args.out.absolute())] if args.out else []
    return subprocess.run([sys.executable, str(root / SCRIPT), args.row, *out], cwd=root, check=False).returncode
