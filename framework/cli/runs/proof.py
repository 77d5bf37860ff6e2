"""The proof that a killed and resumed run equals a straight one: what is started, who is killed, what is compared."""

import ast
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightspan.cli.config.allow import class_paths
from lightspan.cli.config.resolve import Resolved, with_layer
from lightspan.cli.config.signatures import Signature, signature
from lightspan.cli.config.tree import dump
from lightspan.cli.runs.differences import (
    first_difference,
    first_distant_weight,
    first_other_batch,
    first_other_count,
    largest_difference,
    redone,
    trace_of,
)
from lightspan.cli.runs.elastic import Ended, keep_running
from lightspan.cli.runs.fits import fit_command, last_lines, ranks_of
from lightspan.cli.runs.rank_counts import global_batch, micro_batches
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.runs import CHECKPOINTS, OUTPUT, TRACE

LOSS_TOLERANCE = 1e-5
"""Largest relative difference of losses between numbers of ranks, in float64: sums are computed in another order. In a
recipe's own precision, training can amplify a last bit beyond that, so losses are not compared there. Nor with moments
of 8 or 16 bits, which are rounded at random: a last bit decides which way.
"""

DOUBLE = "float64"

KILL = "lightspan.cli.runs.kill_at.KillAt"  # no recipe may name it: its module is allowed for the runs of a proof alone

_IN_STEP = ("batch_start", "before_backward", "before_step", "batch_end")  # places of KILL

_AFTER_SAVE = "after_save"  # one more: after the first checkpoint at or after the end of the step

_FLOAT64 = {"class_path": "lightning.pytorch.plugins.precision.DoublePrecision"}

_WIDE = {"class_path": "lightspan.optim.matrices.moments.Float32Moments"}

_RUN = {"save_dir": "${run}"}


@dataclass(frozen=True)
class ProofSettings:
    """What is proved.

    Attributes:
        ranks: numbers of ranks; one where ranks are lost.
        kills: how often a run is killed.
        steps: optimiser steps of a run, with a checkpoint after each `every`.
        lose: ranks that are lost one after the other, each once; 0 for runs that are killed as a whole.
        counts: where ranks are lost, the numbers of ranks that the run may have, from the largest down.
    """

    ranks: list[int]
    kills: int
    steps: int
    every: int
    seed: int
    lose: int = 0
    counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Kill:
    """SIGKILL of one rank in the step after `step` finished ones, at a place of KILL; with `ranks`, only in the start
    on so many.
    """

    step: int
    place: str
    rank: int
    ranks: int | None = None


@dataclass(frozen=True)
class Leg:
    """One start of a run: on how many ranks, who is killed in it (None: it finishes), and whether in float64 instead of
    the recipe's own precision. With `losses` the run finishes by itself, on what is left after each of them.
    """

    ranks: int
    kill: Kill | None
    double: bool = False
    losses: tuple[Kill, ...] = ()


def refuse_uneven_batches(resolved: Resolved, ranks: Sequence[int]) -> None:
    """Checks now rather than in the run that would fail. Data of others may give `batch_size` another meaning."""
    if (batch_size := global_batch(resolved)) is not None:
        from lightspan.datamodules.loading.loader import split_batch

        for count in ranks:
            split_batch(batch_size, count, micro_batches(resolved))


def planned_runs(settings: ProofSettings) -> dict[str, list[Leg]]:
    """Folder name -> the starts of that run. The same settings give the same kills."""
    draw = random.Random(settings.seed)
    runs: dict[str, list[Leg]] = {}
    if settings.lose:
        losses = _losses(draw, settings)
        runs[f"straight-1-{DOUBLE}"] = [Leg(1, None, double=True)]
        runs[_losing(settings)] = [Leg(settings.ranks[0], None, double=True, losses=losses)]
        return runs
    for count in settings.ranks:
        runs[f"straight-{count}"] = [Leg(count, None)]
        runs[f"killed-{count}"] = _legs(draw, settings, [count])
    if len(settings.ranks) > 1:
        for count in settings.ranks:
            runs[f"straight-{count}-{DOUBLE}"] = [Leg(count, None, double=True)]
        changing = _legs(draw, settings, settings.ranks)
        runs[f"changing-{DOUBLE}"] = [replace(leg, double=True) for leg in changing]
    return runs


def _legs(draw: random.Random, settings: ProofSettings, ranks: Sequence[int]) -> list[Leg]:
    """The starts of a run that is killed at increasing steps, on the numbers of ranks in turn."""
    counts = [ranks[number % len(ranks)] for number in range(settings.kills + 1)]
    steps = sorted(draw.sample(range(settings.steps), settings.kills))
    kills = []
    for step, after, count in zip(steps, [*steps[1:], settings.steps], counts, strict=False):
        saved = min((step // settings.every + 1) * settings.every, settings.steps)
        places = (*_IN_STEP, _AFTER_SAVE) if saved <= after else _IN_STEP  # the next kill must still come
        kills.append(Kill(step, draw.choice(places), draw.randrange(count)))
    return [Leg(count, kill) for count, kill in zip(counts, [*kills, None], strict=True)]


def _losing(settings: ProofSettings) -> str:
    return f"losing-{settings.ranks[0]}-{DOUBLE}"


def _losses(draw: random.Random, settings: ProofSettings) -> tuple[Kill, ...]:
    """One kill in each start but the last, after a checkpoint where there is one by then."""
    first = min(settings.every, settings.steps - settings.lose)
    kills, left, ranks = [], settings.ranks[0], settings.ranks[0]
    for step in sorted(draw.sample(range(first, settings.steps), settings.lose)):
        kills.append(Kill(step, draw.choice(_IN_STEP), draw.randrange(ranks), ranks))
        left -= 1  # ranks that are not among those that the batch can be shared by wait
        ranks = max(count for count in settings.counts if count <= left)
    return tuple(kills)


def verdicts(settings: ProofSettings, folder: Path) -> Iterator[tuple[str, str | None]]:
    """(claim, the first difference or None)."""
    yield from _verdicts_on_losses(settings, folder) if settings.lose else _verdicts_on_kills(settings, folder)


def _verdicts_on_losses(settings: ProofSettings, folder: Path) -> Iterator[tuple[str, str | None]]:
    straight, losing = folder / f"straight-1-{DOUBLE}", folder / _losing(settings)
    both = f"{losing.name} and {straight.name}"
    batches = trace_of(straight)
    samples = sum(len(batch.samples) for batch in batches.values())
    yield (
        f"{both}: the same {samples} samples in the same {len(batches)} batches, of which {redone(losing)} done again "
        f"after a loss count once; losses within {LOSS_TOLERANCE:g}",
        first_other_batch(straight, losing, LOSS_TOLERANCE),
    )
    found = first_distant_weight(straight, losing, LOSS_TOLERANCE)
    yield f"{both}: the weights of the last checkpoint within {LOSS_TOLERANCE:g}", found
    yield f"{both}: each figure logged once for each step", first_other_count(straight, losing)


def _verdicts_on_kills(settings: ProofSettings, folder: Path) -> Iterator[tuple[str, str | None]]:
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


def start(resolved: Resolved, settings: ProofSettings, run_dir: Path, leg: Leg) -> list[str]:
    """Runs one leg; returns what happened in it. Raises: UserError if it ends in another way than planned."""
    recipe = run_dir.with_name(f"{run_dir.name}.yaml")
    kills = [KILL.rpartition(".")[0]] if leg.kill is not None or leg.losses else []
    allowed = replace(resolved, allow_modules=(*resolved.allow_modules, *kills))
    changed = with_layer(allowed, _changes(resolved, settings, run_dir, leg))
    if leg.double:
        changed = with_layer(changed, _wide_moments(changed))
    write_atomic(recipe, dump(changed.document()))
    words = [str(recipe), *changed.permissions()]
    log = run_dir / OUTPUT
    if leg.losses:
        command = fit_command([*words, "--elastic"], run_dir)
        ended = keep_running(lambda ranks, _: ranks_of(command, ranks, log), settings.counts, settings.lose)
        _refuse_other_end(ended, leg, run_dir)
        return [str(loss) for loss in ended.losses]
    statuses = ranks_of(fit_command(words, run_dir), leg.ranks, log)
    killed = -signal.SIGKILL in statuses
    if killed != (leg.kill is not None) or (not killed and any(statuses)):
        status = next((status for status in statuses if status), 0)
        wanted = "be killed" if leg.kill else "finish"
        raise UserError(
            f"{run_dir.name} on {leg.ranks} rank(s) should {wanted} but ended with status {status}; its last lines:\n"
            + last_lines(log)
        )
    return []


def _refuse_other_end(ended: Ended, leg: Leg, run_dir: Path) -> None:
    met = [(loss.ranks, loss.before) for loss in ended.losses]
    if ended.status == 0 and met == [((kill.rank,), kill.ranks) for kill in leg.losses]:
        return
    said = "; ".join([*map(str, ended.losses), *([ended.reason] if ended.reason else [])]) or "nothing was lost"
    raise UserError(
        f"{run_dir.name} on {leg.ranks} ranks should lose {len(leg.losses)} and finish but ended with status "
        f"{ended.status} ({said}); its last lines:\n{last_lines(run_dir / OUTPUT)}"
    )


def _changes(resolved: Resolved, settings: ProofSettings, run_dir: Path, leg: Leg) -> dict[str, Any]:
    """What a proof changes in the recipe: its length, its checkpoints, its logs, and the kill."""
    checkpoint = {"dirpath": f"${{run}}/{CHECKPOINTS}", "every_n_train_steps": settings.every, "save_top_k": 1}
    callbacks: dict[str, Any] = {
        "proof_length": {
            "class_path": "lightspan.callbacks.resilience.proof.StopAfter",
            "init_args": {"steps": settings.steps},
        },
        "checkpoint": {"class_path": "lightspan.callbacks.resilience.checkpoint.Checkpoint", "init_args": checkpoint},
        "proof_trace": {
            "class_path": "lightspan.callbacks.resilience.proof.Trace",
            "init_args": {"folder": f"${{run}}/{TRACE}"},
        },
    }
    for number, kill in enumerate([leg.kill] if leg.kill is not None else leg.losses):
        callbacks["proof_kill" + (f"_{number}" if number else "")] = {"class_path": KILL, "init_args": asdict(kill)}
    trainer: dict[str, Any] = {
        "devices": leg.ranks,
        "log_every_n_steps": 1,
        "callbacks": callbacks,
        "logger": {"jsonl": {"class_path": "lightspan.training.loggers.jsonl.JsonlLogger", "init_args": _RUN}},
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


def _wide_moments(resolved: Resolved) -> dict[str, Any]:
    """The change that stores the moments of every optimiser of the recipe as they are computed."""
    change: dict[str, Any] = {}
    for path, node in class_paths(resolved.tree):
        takes = signature(node.value)
        named = all(isinstance(key, str) for key in path)  # a list has no key under which to change its parts
        if named and isinstance(takes, Signature) and _stores_moments(takes):
            part = change
            for key in (*map(str, path[:-1]), "init_args"):
                part = part.setdefault(key, {})
            part["moments"] = _WIDE
    return change


def _stores_moments(takes: Signature) -> bool:
    annotation = takes.parameters["moments"].annotation if "moments" in takes.parameters else None
    return annotation is not None and ast.unparse(annotation).endswith("MomentStorage")
