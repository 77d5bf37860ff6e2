"""The runs of a search: each is the recipe with a subspace, seeds and a learning rate, in its own folder."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightspan.cli.config.resolve import Resolved, with_layer
from lightspan.cli.config.tree import dump
from lightspan.cli.report.compare import differences
from lightspan.cli.runs.fits import Task, fit_command
from lightspan.cli.runs.metrics import last_values
from lightspan.cli.studies.dimension.search import Fit, SearchSettings
from lightspan.cli.studies.queue import run_queue
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import remove, write_atomic
from lightspan.core.files.foreign import settings_object
from lightspan.core.files.runs import METRICS, OUTPUT, REFERENCES, SUBSPACE, SUMMARY

CALLBACK = "lightspan.callbacks.training.intrinsic_dimension.IntrinsicDimension"
ENTRY = "intrinsic_dimension"


def require_rate(resolved: Resolved, key: str) -> None:
    if key not in resolved.sources:
        rates = [path for path in resolved.sources if path.split(".")[-1] == "lr"]
        raise UserError(
            f"--lrs sets {key}, but {resolved.name} has no such key; name it with --lr-key"
            + (f", for example {rates[0]}" if rates else "")
        )


def train(resolved: Resolved, settings: SearchSettings, fits: Sequence[Fit]) -> dict[Fit, float]:
    """Finished runs in the folder are kept, all others are started afresh, `workers` at a time."""
    runs = settings.out / "runs"
    waiting = [fit for fit in fits if not _finished(resolved, settings, fit)]

    def tasks() -> Iterator[Task]:
        for fit in waiting:
            run, recipe = runs / fit.name, runs / f"{fit.name}.yaml"
            remove(run)
            write_atomic(recipe, recipe_of(resolved, settings, fit))
            yield Task(fit.name, fit_command([str(recipe), *resolved.permissions()], run), run / OUTPUT)

    run_queue(tasks(), settings.workers, len(fits), len(fits) - len(waiting))
    return {fit: _value(runs / fit.name, settings.metric) for fit in fits}


def _finished(resolved: Resolved, settings: SearchSettings, fit: Fit) -> bool:
    """Whether the folder contains this run, complete. Raises: UserError if it contains another run of that name."""
    folder = settings.out / "runs" / fit.name
    try:
        finished = settings_object(folder / SUMMARY)["finished"] is True
    except (ValueError, KeyError):
        return False
    recipe, wanted = folder.with_name(f"{fit.name}.yaml"), recipe_of(resolved, settings, fit)
    if finished and recipe.is_file() and recipe.read_text() != wanted:
        import yaml

        found = differences([yaml.safe_load(recipe.read_text()), yaml.safe_load(wanted)])
        lines = "\n".join(f"  {key}: {before} -> {now}" for key, (before, now) in found[:10])
        raise UserError(
            f"{settings.out} contains a search with other settings (then -> now, in {fit.name}):\n{lines}\n"
            "Restore them, or give another --out DIR"
        )
    return finished


def recipe_of(resolved: Resolved, settings: SearchSettings, fit: Fit) -> str:
    return dump(with_layer(resolved, layer(resolved, settings, fit)).document())


def layer(resolved: Resolved, settings: SearchSettings, fit: Fit) -> dict[str, Any]:
    """What a run changes in the recipe: seeds, subspace and rate; and nothing is kept for resuming."""
    trainer = resolved.config.get("trainer", {})
    callbacks, loggers = (trainer.get(kind) for kind in ("callbacks", "logger"))
    callbacks, loggers = (given if isinstance(given, dict) else {} for given in (callbacks, loggers))
    unneeded = ("checkpoint", "preemption")
    changed: dict[str, Any] = {name: None for name in callbacks if name in unneeded or _is_subspace(callbacks[name])}
    changed["summary"] = {
        "class_path": "lightspan.callbacks.watching.run_summary.RunSummary",
        "init_args": {"path": "${run}/summary.json"},
    }
    if fit.dim is not None:
        settings_of = {"dim": fit.dim, "seed": fit.drawn(), "projection": {"class_path": settings.projection}}
        settings_of |= {"layer_scales": True} if settings.layer_scales else {}
        changed[ENTRY] = {"class_path": CALLBACK, "init_args": settings_of | {"path": f"${{run}}/{SUBSPACE}"}}
    jsonl = {"class_path": "lightspan.training.loggers.jsonl.JsonlLogger", "init_args": {"save_dir": "${run}"}}
    logger = {**{name: None for name in loggers if name != "jsonl"}, "jsonl": jsonl}
    found: dict[str, Any] = {
        "seed_everything": fit.drawn(),
        "trainer": {"enable_checkpointing": False, "callbacks": changed, "logger": logger},
    }
    if fit.lr is not None:
        place = found
        *path, last = settings.lr_key.split(".")
        for key in path:
            place = place.setdefault(key, {})
        place[last] = fit.lr
    return found


def _is_subspace(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("class_path") == CALLBACK


def _value(folder: Path, metric: str) -> float:
    """The last value of the metric; NaN if the run has not ended, or logged none."""
    return last_values(folder / METRICS).get(metric, math.nan) if (folder / SUMMARY).is_file() else math.nan


def references_of(resolved: Resolved, settings: SearchSettings) -> dict[str, Any]:
    """What needs no training, kept in references.json. Raises: UserError for a metric that validation does not log, and
    for a grid beyond the number of weights.
    """
    from lightspan.cli.studies.dimension.references import references

    direct = with_layer(resolved, layer(resolved, settings, Fit(None, settings.lrs[0], 0)))
    path, wanted = settings.out / REFERENCES, {"recipe": dump(direct.document()), "seeds": settings.seeds}
    try:
        found = settings_object(path)
    except ValueError:
        found = {}
    if {key: found.get(key) for key in wanted} != wanted:
        print("measuring what needs no training: the untrained network and a linear probe on its features", flush=True)
        seeds = {seed: Fit(0, None, seed).drawn() for seed in range(settings.seeds)}
        found = references(direct, seeds, settings.metric) | wanted
        write_atomic(path, json.dumps(found, indent=2) + "\n")
    if settings.grid[-1] > found["parameters"]:
        raise UserError(
            f"--grid ends at {settings.grid[-1]:,}, but {resolved.name} trains {found['parameters']:,} weights; a "
            "subspace can have at most that many dimensions"
        )
    return found
