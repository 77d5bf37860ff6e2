"""`lightspan replay RUN`: takes a step again whose numbers were not finite, and names where that begins."""

import argparse
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from lightspan.cli.commands.arguments import add_allow_module_argument, folder
from lightspan.cli.config.flags import flag_layer
from lightspan.cli.config.resolve import load_resolved, with_layer
from lightspan.cli.config.tree import plain
from lightspan.cli.runs.folder import is_first_rank
from lightspan.core.errors import UserError, one_line, print_notes, printable
from lightspan.core.files.runs import CAPTURES

if TYPE_CHECKING:
    from lightspan.cli.replay.findings import NotFinite
    from lightspan.training.captures import Capture

MOST_LINES, MOST_LATER = 12, 4
TURNED_OUT_FINITE = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=folder, metavar="RUN", help="a run folder with captures")
    parser.add_argument("--step", type=int, metavar="N", help="the captured step (default: the last one)")
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument(
        "--rank", type=int, metavar="R", help="replay what this rank saw (default: each rank until one is found)"
    )
    whose.add_argument(
        "--all-ranks",
        action="store_true",
        help="replay on as many ranks as the run had, with its devices and strategy, for losses over all of them",
    )
    add_allow_module_argument(parser)
    parser.epilog = (
        "Flags: key.path=value, over the run's configuration: trainer.precision=32-true says whether the precision is "
        "to blame. Exit status 1: the step is finite here."
    )


def run(args: argparse.Namespace) -> int:
    """Raises: UserError for a run without captures, one that is not whole, or classes that may not be named."""
    resolved = load_resolved(args.run_dir, args.allow_modules)
    if args.flags:
        resolved = with_layer(resolved, plain(flag_layer(args.flags)))
    at = _chosen(args.run_dir / CAPTURES, args.step)

    from lightspan.cli.planning.one_process import in_one_process
    from lightspan.cli.replay.step import replayed, replayed_together
    from lightspan.training.captures import Capture

    capture = Capture.read(at)
    if args.rank is not None and not 0 <= args.rank < capture.ranks:
        raise UserError(f"--rank {args.rank}: the run had {capture.ranks} ranks; give one of 0 to {capture.ranks - 1}")
    if is_first_rank():
        print(f"captured: {one_line(capture.reason)}")
        print_notes([*resolved.notes, *capture.remarks])
    if args.all_ranks:
        by_rank = replayed_together(resolved, at, capture)
    else:
        alone, by_rank = in_one_process(resolved), {}
        for rank in _order(capture) if args.rank is None else [args.rank]:
            by_rank = {rank: replayed(alone, at, capture, rank)}
            if by_rank[rank]:
                break
    if is_first_rank():
        print(printable("\n".join(_report(by_rank, capture))))
    return 0 if any(by_rank.values()) or not is_first_rank() else TURNED_OUT_FINITE


def _chosen(captured: Path, step: int | None) -> Path:
    """The folder of the capture that --step means."""
    from lightspan.training.captures import captures

    found = captures(captured)
    if not found:
        raise UserError(
            f"{captured} has no capture; the callback FiniteLoss writes one when a loss or gradient is not finite"
        )
    if step is None:
        return found[max(found)]
    if step not in found:
        raise UserError(f"--step {step}: {captured} has {', '.join(f'step {n}' for n in found)}")
    return found[step]


def _order(capture: "Capture") -> Iterator[int]:
    """Ranks whose own loss was not finite first."""
    others = (rank for rank in range(capture.ranks) if rank not in capture.broken)  # a file may claim any number
    return chain(dict.fromkeys(capture.broken), others)


def _report(by_rank: "dict[int, list[NotFinite]]", capture: "Capture") -> list[str]:
    lines = []
    for rank, found in by_rank.items():
        if not found:
            continue
        first, *later = found
        whose = f"rank {rank}: " if capture.ranks > 1 else ""
        lines += [f"{whose}first, {first.what} is not finite", *(f"    {line}" for line in first.details[:MOST_LINES])]
        lines += [f"  later, {one.what} is not finite" for one in later[:MOST_LATER]]
        lines += [f"  and {len(later) - MOST_LATER} more"] * (len(later) > MOST_LATER)
    return lines or [
        f"step {capture.step} is finite here. Numbers that just overflowed may differ on another device, with another "
        "number of ranks (see --all-ranks), or where an operation is not deterministic"
    ]
