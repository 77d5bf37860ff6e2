"""`lightspan reproduce ROW`: measures a row of the evidence or of a benchmark, or a network, against what is stored."""

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
        "docs/comparison.md (quality/stdlib/factored_muon), or a network that `lightspan pull` lists (linear-fashion)",
    )
    parser.add_argument(
        "--checkout",
        type=folder,
        help="the clone of lightspan whose code is run (default: the one that is installed here)",
    )
    parser.add_argument("--out", type=Path, help="where the new record is kept (default: build/reproduce in the clone)")
    parser.epilog = (
        "Runs the code of the clone, with the seeds and settings that are stored. Exit status 1: a figure lies outside "
        "of the spread that its seeds had."
    )


def run(args: argparse.Namespace) -> int:
    """Raises: UserError for a folder that is no clone."""
    # Not the current folder's code, which somebody else may have written: that runs only if the user names it.
    root = args.checkout or Path(__file__).resolve().parents[3]
    if not (root / SCRIPT).is_file():
        raise UserError(
            f"{root} is not a clone of lightspan, which holds the measurements; name one by --checkout=FOLDER, whose "
            "code is then run"
        )
    out = ["--out", str(args.out.absolute())] if args.out else []
    return subprocess.run([sys.executable, str(root / SCRIPT), args.row, *out], cwd=root, check=False).returncode
