"""`lightspan prove-resume`: compares an uninterrupted run with the same run killed at random steps and resumed."""

import argparse
import importlib
import inspect
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightspan.commands.arguments import add_recipe_arguments, folder
from lightspan.config.resolve import Resolved, resolve, with_layer
from lightspan.config.tree import dump
from lightspan.errors import UserError, print_notes
from lightspan.files import write_atomic
from lightspan.runs.differences import first_difference, first_other_batch, largest_difference
from lightspan.runs.fits import exits_on_sigterm, fit_command, last_lines, ranks_of
from lightspan.runs.seed import with_seed

DIFFERENT = 1
LOSS_TOLERANCE = 1e-5
"""Largest relative difference of losses between numbers of ranks, in float64: sums are computed in another order. In a
recipe's own precision, training can amplify a last bit beyond that, so losses are not compared there.
"""
DOUBLE = "float64"
OWN_DATA = "lightspan.datamodules."
_IN_STEP = ("batch_start", "before_backward", "before_step", "batch_end")  # places of `callbacks.proof.KillAt`
_AFTER_SAVE = "after_save"  # one more: after the first checkpoint at or after the end of the step
_FLOAT64 = {"class_path": "lightning.pytorch.plugins.precision.DoublePrecision"}
_RUN = {"save_dir": "${run}"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--kills", type=int, default=2, metavar="N", help="how often a run is killed (default 2)")
    parser.add_argument("--ranks", default="1", metavar="1,2", help="numbers of ranks to test (default 1)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="optimiser steps of a run (default 20)")
    parser.add_argument("--every", type=int, metavar="N", help="steps between checkpoints (default: --steps / 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the steps and places of the kills (default 0)")
    parser.add_argument("--keep", type=folder, metavar="DIR", help="keep the runs in DIR instead of deleting them")


@dataclass(frozen=True)
class _Settings:
    ranks: list[int]
    kills: int
    steps: int
    every: int
    seed: int


@dataclass(frozen=True)
class Kill:
    """SIGKILL of one rank in the step after `step` finished ones, at a place of `callbacks.proof.KillAt`."""

    step: int
    place: str
    rank: int


@dataclass(frozen=True)
class Leg:
    """One start of a run: on how many ranks, who is killed in it (None: it finishes), and whether in float64 instead of
    the recipe's own precision.
    """

    ranks: int
    kill: Kill | None
    double: bool = False


def run(args: argparse.Namespace) -> int:
    """0 if everything promised is equal, else 1. Raises: UserError for impossible numbers, and for a run that fails
    by itself.
    """
    settings = _settings(args)
    resolved = resolve(args.recipe, args.overlays, args.flags, args.allow_modules)
    own = resolved.config.get("trainer", {}).get("max_steps")
    if isinstance(own, int) and 0 <= own < settings.steps:
        raise UserError(
            f"--steps {settings.steps} is more than the recipe's trainer.max_steps={own}; lower the one or raise the "
            "other"
        )
    _refuse_uneven_batches(resolved, settings.ranks)
    with exits_on_sigterm():
        return _in_folder(args, resolved, settings)


def _refuse_uneven_batches(resolved: Resolved, ranks: Sequence[int]) -> None:
    """Checks now rather than in the run that would fail. Data of others may give `batch_size` another meaning."""
    data, trainer = resolved.config.get("data"), resolved.config.get("trainer", {})
    if not isinstance(data, dict) or not data.get("class_path", "").startswith(OWN_DATA):
        return
    module, _, name = data["class_path"].rpartition(".")
    default = inspect.signature(getattr(importlib.import_module(module), name)).parameters["batch_size"].default
    batch_size = data.get("init_args", {}).get("batch_size", default)
    accumulate = trainer.get("accumulate_grad_batches", 1)
    if isinstance(batch_size, int) and isinstance(accumulate, int):
        from lightspan.datamodules.loading.loader import split_batch

        for count in ranks:
            split_batch(batch_size, count, accumulate)


def _in_folder(args: argparse.Namespace, resolved: Resolved, settings: _Settings) -> int:
    if args.keep is None:
        with tempfile.TemporaryDirectory(prefix="lightspan-prove-") as folder:
            return _prove(resolved, settings, Path(folder))
    if args.keep.exists() and any(args.keep.iterdir()):
        raise UserError(f"--keep {args.keep} is not empty; name a new folder")
    args.keep.mkdir(parents=True, exist_ok=True)
    return _prove(resolved, settings, args.keep.absolute())


def _settings(args: argparse.Namespace) -> _Settings:
    try:
        ranks = [int(part) for part in args.ranks.split(",")]
    except ValueError:
        ranks = []
    if not ranks or min(ranks) < 1 or len(set(ranks)) < len(ranks):
        raise UserError(f"--ranks {args.ranks!r} must be different whole numbers from 1 up, such as 1,2")
    if not 1 <= args.kills < args.steps:
        raise UserError(f"--kills {args.kills} must be at least 1 and below --steps {args.steps}")
    every = max(1, args.steps // 5) if args.every is None else args.every
    if not 1 <= every <= args.steps:
        raise UserError(f"--every {every} must be at least 1 and at most --steps {args.steps}")
    return _Settings(ranks, args.kills, args.steps, every, args.seed)


def _prove(resolved: Resolved, settings: _Settings, folder: Path) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console, runs = Console(highlight=False, soft_wrap=True), _runs(settings)
    resolved = with_seed(resolved, folder, None)  # the same for all starts, each of which has its own folder
    print_notes(resolved.notes)
    console.print(f"{resolved.name}: {settings.steps} steps, a checkpoint every {settings.every}, seed {settings.seed}")
    for name, legs in runs.items():
        for kill in (leg.kill for leg in legs if leg.kill is not None):
            console.print(f"  {name}: rank {kill.rank} is killed in step {kill.step}, at {kill.place}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(map(len, runs.values())))
        for name, legs in runs.items():
            for number, leg in enumerate(legs, 1):
                progress.update(task, description=f"{name}, start {number} of {len(legs)}")
                began_s = time.monotonic()
                _start(resolved, settings, folder / name, leg)
                progress.advance(task)
                ended = f"{'finished' if leg.kill is None else 'was killed'} after {time.monotonic() - began_s:.0f} s"
                console.print(f"  {name}: start {number} of {len(legs)} {ended}")
    differing = 0
    for claim, difference in _verdicts(settings, folder):
        differing += difference is not None
        console.print(
            f"equal      {claim}" if difference is None else f"DIFFERENT  {claim}: {difference}", markup=False
        )
    return DIFFERENT if differing else 0


def _runs(settings: _Settings) -> dict[str, list[Leg]]:
    """Folder name -> the starts of that run. The same settings give the same kills."""
    draw = random.Random(settings.seed)
    runs: dict[str, list[Leg]] = {}
    for count in settings.ranks:
        runs[f"straight-{count}"] = [Leg(count, None)]
        runs[f"killed-{count}"] = _legs(draw, settings, [count])
    if len(settings.ranks) > 1:
        for count in settings.ranks:
            runs[f"straight-{count}-{DOUBLE}"] = [Leg(count, None, double=True)]
        changing = _legs(draw, settings, settings.ranks)
        runs[f"changing-{DOUBLE}"] = [replace(leg, double=True) for leg in changing]
    return runs


def _legs(draw: random.Random, settings: _Settings, ranks: Sequence[int]) -> list[Leg]:
    """The starts of a run that is killed at increasing steps, on the numbers of ranks in turn."""
    counts = [ranks[number % len(ranks)] for number in range(settings.kills + 1)]
    steps = sorted(draw.sample(range(settings.steps), settings.kills))
    kills = []
    for step, after, count in zip(steps, [*steps[1:], settings.steps], counts, strict=False):
        saved = min((step // settings.every + 1) * settings.every, settings.steps)
        places = (*_IN_STEP, _AFTER_SAVE) if saved <= after else _IN_STEP  # the next kill must still come
        kills.append(Kill(step, draw.choice(places), draw.randrange(count)))
    return [Leg(count, kill) for count, kill in zip(counts, [*kills, None], strict=True)]


def _verdicts(settings: _Settings, folder: Path) -> Iterator[tuple[str, str | None]]:
    """(claim, the first difference or None)."""
    for count in settings.ranks:
        found = first_difference(folder / f"straight-{count}", folder / f"killed-{count}")
        yield f"killed-{count} and straight-{count}: checkpoint, samples, buffers and logged figures bit for bit", found
    if len(settings.ranks) == 1:
        return
    first, *others = [f"straight-{count}" for count in settings.ranks]
    for name in others:
        found = first_other_batch(folder / first, folder / name)
        away = largest_difference(folder / first, folder / name)
        yield f"{name} and {first}: samples the same (losses, rounded as the recipe does, within {away:.1g})", found
    for name in (*(f"{other}-{DOUBLE}" for other in others), f"changing-{DOUBLE}"):
        found = first_other_batch(folder / f"{first}-{DOUBLE}", folder / name, LOSS_TOLERANCE)
        yield f"{name} and {first}-{DOUBLE}: samples the same, losses within {LOSS_TOLERANCE:g}", found


def _start(resolved: Resolved, settings: _Settings, run_dir: Path, leg: Leg) -> None:
    """Runs one leg. Raises: UserError if it ends in another way than planned."""
    recipe = run_dir.with_name(f"{run_dir.name}.yaml")
    write_atomic(recipe, dump(with_layer(resolved, _changes(resolved, settings, run_dir, leg)).document()))
    log = run_dir / "output.txt"
    statuses = ranks_of(fit_command(recipe, run_dir, resolved.allow_modules), leg.ranks, log)
    killed = -signal.SIGKILL in statuses
    if killed != (leg.kill is not None) or (not killed and any(statuses)):
        status = next((status for status in statuses if status), 0)
        wanted = "be killed" if leg.kill else "finish"
        raise UserError(
            f"{run_dir.name} on {leg.ranks} rank(s) should {wanted} but ended with status {status}; its last lines:\n"
            + last_lines(log)
        )


def _changes(resolved: Resolved, settings: _Settings, run_dir: Path, leg: Leg) -> dict[str, Any]:
    """What a proof changes in the recipe: its length, its checkpoints, its logs, and the kill."""
    checkpoint = {"dirpath": "${run}/checkpoints", "every_n_train_steps": settings.every, "save_top_k": 1}
    callbacks: dict[str, Any] = {
        "proof_length": {
            "class_path": "lightspan.callbacks.resilience.proof.StopAfter",
            "init_args": {"steps": settings.steps},
        },
        "checkpoint": {"class_path": "lightspan.callbacks.resilience.checkpoint.Checkpoint", "init_args": checkpoint},
        "proof_trace": {
            "class_path": "lightspan.callbacks.resilience.proof.Trace",
            "init_args": {"folder": "${run}/trace"},
        },
    }
    if leg.kill is not None:
        kill = {"step": leg.kill.step, "place": leg.kill.place, "rank": leg.kill.rank}
        callbacks["proof_kill"] = {"class_path": "lightspan.callbacks.resilience.proof.KillAt", "init_args": kill}
    trainer: dict[str, Any] = {
        "devices": leg.ranks,
        "log_every_n_steps": 1,
        "callbacks": callbacks,
        "logger": {"jsonl": {"class_path": "lightspan.loggers.jsonl.JsonlLogger", "init_args": _RUN}},
    }
    given = resolved.config.get("trainer", {})
    loggers = given.get("logger")
    trainer["logger"] |= {name: None for name in (loggers if isinstance(loggers, dict) else {}) if name != "jsonl"}
    if max(settings.ranks) > 1 and "strategy" not in given:  # the same for every leg, or it would be another experiment
        trainer["strategy"] = "ddp"
    if leg.double:  # as a plugin, since Lightning refuses precision=64-true together with a sharding strategy
        plugins = given.get("plugins") or []
        trainer |= {"precision": None, "plugins": [*(plugins if isinstance(plugins, list) else [plugins]), _FLOAT64]}
    return {"trainer": trainer}
