"""`lightspan fsck RUN`: which checkpoints of a run are complete; moves damaged ones away and fixes the pointer."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from lightspan.cli.commands.arguments import folder
from lightspan.core.errors import UserError, printable
from lightspan.core.files.atomic import explained_os_errors, irregular, leftovers, put_back, refuse_link_out, remove
from lightspan.core.files.runs import CHECKPOINTS
from lightspan.training.checkpoints.manifest import (
    LATEST,
    Fault,
    checkpoints,
    fault,
    latest,
    manifest,
    set_latest,
)

QUARANTINE = "quarantine"
TORN = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=folder, help="a run folder that no run is writing to")
    parser.add_argument("--dry-run", action="store_true", help="report what would be moved, move nothing")


def run(args: argparse.Namespace) -> int:
    """Prints one line per checkpoint; moves torn ones to RUN/checkpoints/quarantine, deletes none. 1 if any."""
    folder = args.run_folder / CHECKPOINTS
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} does not exist; name a run folder, which contains {CHECKPOINTS}/")
    for inside in (folder, folder / QUARANTINE):
        refuse_link_out(inside, args.run_folder, "its run folder")  # files would be moved there
    if not args.dry_run:
        put_back(folder)
    found = {path: fault(path) or _unusable(path) for path in checkpoints(folder)}
    found |= {path: Fault("was left unfinished by a killed process") for path in leftovers(folder)}
    _print_table(found, latest(folder))
    torn = [path for path, wrong in found.items() if wrong is not None and wrong.torn]
    for path in torn if not args.dry_run else []:
        print(printable(f"moved {path.name} to {_quarantine(path)}"))
    if not args.dry_run:
        _mend_pointer(folder, [path for path, wrong in found.items() if wrong is None])
    print(
        printable(
            f"{len(found) - len(torn)} whole, {len(torn)} torn" + (", nothing moved" if args.dry_run and torn else "")
        )
    )
    return TORN if torn else 0


def _unusable(path: Path) -> Fault | None:
    """What is wrong inside a checkpoint that its manifest calls whole: a manifest reveals damage, not wrong content."""
    from lightspan.training.checkpoints.io import unusable

    reason = unusable(path)
    return Fault(reason) if reason else None


def _print_table(found: dict[Path, Fault | None], pointed: Path | None) -> None:
    width = max([len(path.name) for path in found] + [10])
    print(f"{'checkpoint':<{width}}  {'step':>9}  {'MiB':>10}  state")
    for path, wrong in found.items():
        told = manifest(path) or {}
        state = "whole" if wrong is None else wrong.text
        if wrong is None and not told:
            state = "whole (no manifest: check sums of its records)"
        if path == pointed:
            state += f"  <- {LATEST}"
        step = told.get("step")
        print(printable(f"{path.name:<{width}}  {step if type(step) is int else '?':>9}  {_mib(path):>10.2f}  {state}"))


def _mib(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if not irregular(file)) / 2**20


def _quarantine(path: Path) -> Path:
    name = path.name.removeprefix(".")
    place = path.parent / QUARANTINE / name
    for number in range(2, 10_000):
        if not os.path.lexists(place):
            break
        place = place.with_name(f"{name}.{number}")
    with explained_os_errors(place):
        place.parent.mkdir(exist_ok=True)
        path.rename(place)
    return place


def _mend_pointer(folder: Path, usable: Sequence[Path]) -> None:
    """Keeps a pointer that names a whole checkpoint; otherwise points it to the newest whole one, or removes it."""
    if latest(folder) in usable:
        return
    if usable:
        set_latest(usable[0])
        print(printable(f"{LATEST} now names {usable[0].name}"))
    else:
        remove(folder / LATEST)
