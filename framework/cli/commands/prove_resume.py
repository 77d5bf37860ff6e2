"""`lightspan prove-resume`: compares an uninterrupted run with the same run killed at random steps and resumed."""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from lightspan.cli.commands.arguments import (
    add_data_arguments,
    add_recipe_arguments,
    count,
    folder,
    resolved_from,
)
from lightspan.cli.config.resolve import Resolved
from lightspan.cli.runs.fits import exits_on_sigterm
from lightspan.cli.runs.proof import ProofSettings, planned_runs, refuse_uneven_batches, start, verdicts
from lightspan.cli.runs.rank_counts import refuse_fixed_ranks, usable_counts
from lightspan.cli.runs.seed import with_seed
from lightspan.core.errors import UserError, print_notes

DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--kills", type=int, metavar="N", help="how often a run is killed (default 2)")
    parser.add_argument(
        "--ranks",
        metavar="1,2",
        help="numbers of ranks to test (default 1; with --lose one number, its default one more)",
    )
    parser.add_argument(
        "--lose",
        type=count,
        metavar="N",
        help="instead of killing whole runs: lose N ranks one after the other, continue on the others, and compare "
        "with one process that nobody disturbs",
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="optimiser steps of a run (default 20)")
    parser.add_argument("--every", type=int, metavar="N", help="steps between checkpoints (default: --steps / 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the steps and places of the kills (default 0)")
    parser.add_argument("--keep", type=folder, metavar="DIR", help="keep the runs in DIR instead of deleting them")


def run(args: argparse.Namespace) -> int:
    """0 if everything promised is equal, else 1. Raises: UserError for impossible numbers, and for a run that fails
    by itself.
    """
    settings = _settings(args)
    resolved = resolved_from(args)
    if settings.lose:
        settings = _with_counts(settings, resolved)
    own = resolved.config.get("trainer", {}).get("max_steps")
    if isinstance(own, int) and 0 <= own < settings.steps:
        raise UserError(
            f"--steps {settings.steps} is more than the recipe's trainer.max_steps={own}; lower the one or raise the "
            "other"
        )
    refuse_uneven_batches(resolved, settings.ranks)
    with exits_on_sigterm():
        return _in_folder(args, resolved, settings)


def _in_folder(args: argparse.Namespace, resolved: Resolved, settings: ProofSettings) -> int:
    if args.keep is None:
        with tempfile.TemporaryDirectory(prefix="lightspan-prove-") as folder:
            return _prove(resolved, settings, Path(folder))
    if args.keep.exists() and any(args.keep.iterdir()):
        raise UserError(f"--keep {args.keep} is not empty; name a new folder")
    args.keep.mkdir(parents=True, exist_ok=True)
    return _prove(resolved, settings, args.keep.absolute())


def _settings(args: argparse.Namespace) -> ProofSettings:
    given = args.ranks or str(1 + (args.lose or 0))
    try:
        ranks = [int(part) for part in given.split(",")]
    except ValueError:
        ranks = []
    if not ranks or min(ranks) < 1 or len(set(ranks)) < len(ranks):
        raise UserError(f"--ranks {given!r} must be different whole numbers from 1 up, such as 1,2")
    kills, lose = 2 if args.kills is None else args.kills, args.lose or 0
    if lose and args.kills is not None:
        raise UserError("--kills ends whole runs and --lose single ranks; give one of them")
    if lose and (len(ranks) > 1 or not lose < ranks[0]):
        raise UserError(f"--lose {lose} needs one number of ranks above {lose}, not --ranks {given}")
    if lose and not lose < args.steps:
        raise UserError(f"--lose {lose} must be below --steps {args.steps}")
    if not lose and not 1 <= kills < args.steps:
        raise UserError(f"--kills {kills} must be at least 1 and below --steps {args.steps}")
    every = max(1, args.steps // 5) if args.every is None else args.every
    if not 1 <= every <= args.steps:
        raise UserError(f"--every {every} must be at least 1 and at most --steps {args.steps}")
    return ProofSettings(ranks, kills, args.steps, every, args.seed, lose)


def _with_counts(settings: ProofSettings, resolved: Resolved) -> ProofSettings:
    """With the numbers of ranks that a run may have which loses some. Raises: UserError if its batch cannot be shared
    by all of them at the start.
    """
    refuse_fixed_ranks(resolved)
    refuse_uneven_batches(resolved, settings.ranks)
    return replace(settings, counts=tuple(usable_counts(resolved, settings.ranks[0])))


def _prove(resolved: Resolved, settings: ProofSettings, folder: Path) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from lightspan.core.console import SafeConsole

    console, runs = SafeConsole(highlight=False, soft_wrap=True), planned_runs(settings)
    resolved = with_seed(resolved, folder, None)  # the same for all starts, each of which has its own folder
    print_notes(resolved.notes)
    console.print(f"{resolved.name}: {settings.steps} steps, a checkpoint every {settings.every}, seed {settings.seed}")
    for name, legs in runs.items():
        for kill in (leg.kill for leg in legs if leg.kill is not None):
            console.print(f"  {name}: rank {kill.rank} is killed in step {kill.step}, at {kill.place}")
        for kill in (kill for leg in legs for kill in leg.losses):
            console.print(f"  {name}: rank {kill.rank} of {kill.ranks} is lost in step {kill.step}, at {kill.place}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(map(len, runs.values())))
        for name, legs in runs.items():
            for number, leg in enumerate(legs, 1):
                progress.update(task, description=f"{name}, start {number} of {len(legs)}")
                began_s = time.monotonic()
                for happened in start(resolved, settings, folder / name, leg):
                    console.print(f"  {name}: {happened}")
                progress.advance(task)
                ended = f"{'finished' if leg.kill is None else 'was killed'} after {time.monotonic() - began_s:.0f} s"
                console.print(f"  {name}: start {number} of {len(legs)} {ended}")
    differing = 0
    for claim, difference in verdicts(settings, folder):
        differing += difference is not None
        console.print(
            f"equal      {claim}" if difference is None else f"DIFFERENT  {claim}: {difference}", markup=False
        )
    return DIFFERENT if differing else 0
