"""`lightspan intrinsic-dimension`: d90 of a recipe, the smallest random subspace in which it reaches most of what it
reaches in all its weights.

Source: Li et al. 2018, arXiv 1804.08838, section 2: for growing d the recipe is trained in theta_0 + P z with z of d
numbers, fresh theta_0 and P for each d and seed; d90 is the first d of the grid whose mean performance is on the line.
"""

import argparse
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from lightspan.commands.arguments import add_recipe_arguments, folder
from lightspan.config.resolve import Resolved, resolve, with_layer
from lightspan.config.tree import dump
from lightspan.errors import UserError
from lightspan.files import remove, write_atomic
from lightspan.intrinsic.curve import Curve, Point, target
from lightspan.report.compare import differences
from lightspan.report.runs import METRICS, SUMMARY, load_run
from lightspan.runs.fits import exits_on_sigterm, fit_command, last_lines, run_side_by_side

NOT_REACHED = 1
CALLBACK = "lightspan.callbacks.training.intrinsic_dimension.IntrinsicDimension"
ENTRY = "intrinsic_dimension"
TUNING_SEED = -1
"""Rates are compared on a seed of their own, which no reported figure is of."""
LOG = "output.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--grid", required=True, metavar="0,10,50", help="dimensions, growing; 0: untrained")
    parser.add_argument("--threshold", type=float, default=0.9, help="share of the baseline to reach (default 0.9)")
    parser.add_argument("--metric", default="val/accuracy", help="what validation logs (default val/accuracy)")
    parser.add_argument("--mode", choices=("max", "min"), default="max", help="which end of it is better (default max)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs for each dimension (default 3)")
    parser.add_argument("--lrs", metavar="1e-3,1e-2", help="rates to choose from for each dimension and the baseline")
    parser.add_argument(
        "--lr-key",
        default="model.init_args.optimizer.init_args.lr",
        metavar="KEY",
        help="where the recipe keeps its rate (default model.init_args.optimizer.init_args.lr)",
    )
    parser.add_argument(
        "--projection",
        default="lightspan.subspaces.projections.Fastfood",
        metavar="CLASS",
        help="class path of the random map: Fastfood (default), Dense or Sparse of lightspan.subspaces.projections",
    )
    parser.add_argument("--layer-scales", action="store_true", help="also learn a factor for each layer (SAID)")
    parser.add_argument("--stop-early", action="store_true", help="end at the first dimension that reaches the line")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    parser.add_argument("--out", type=folder, default=Path("intrinsic-dimension"), metavar="DIR", help="where all goes")


@dataclass(frozen=True)
class Settings:
    """The search; `lrs` is [None] where the recipe's own rate stands."""

    grid: list[int]
    threshold: float
    metric: str
    mode: Literal["max", "min"]
    seeds: int
    lrs: list[float | None]
    lr_key: str
    projection: str
    layer_scales: bool
    stop_early: bool
    workers: int
    out: Path


@dataclass(frozen=True)
class Fit:
    """One run of the recipe; `dim` None trains all weights."""

    dim: int | None
    lr: float | None
    seed: int

    @property
    def name(self) -> str:
        where = "direct" if self.dim is None else f"d{self.dim}"
        rate = "" if self.lr is None else f"-lr{self.lr:g}"
        return f"{where}{rate}-" + ("tuning" if self.seed == TUNING_SEED else f"seed{self.seed}")

    def drawn(self) -> int:
        """The seed of theta_0 and of P: another one for each dimension, the same for all rates."""
        return int.from_bytes(hashlib.sha256(f"{self.dim}/{self.seed}".encode()).digest()[:4], "big") >> 1


Train = Callable[[Sequence[Fit]], dict[Fit, float]]
"""Trains what is not trained yet. Returns the metric of each, NaN for one that failed."""


def run(args: argparse.Namespace) -> int:
    """0 when a dimension of the grid reaches the line, 1 when none does. Raises: UserError for what cannot be searched,
    and when every rate of the baseline fails.
    """
    settings = _settings(args)
    resolved = resolve(args.recipe, args.overlays, args.flags, args.allow_modules)
    if settings.lrs != [None]:
        _require_rate(resolved, settings.lr_key)
    _recipe(resolved, settings, Fit(settings.grid[-1], settings.lrs[0], 0))  # complains before anything starts
    with exits_on_sigterm():
        references = _references(resolved, settings)
        curve = search(settings, references, lambda fits: _train(resolved, settings, fits))
    _write(resolved, settings, references, curve)
    return 0 if curve.reached is not None else NOT_REACHED


def _settings(args: argparse.Namespace) -> Settings:
    try:
        grid = [int(part) for part in args.grid.split(",")]
    except ValueError:
        grid = []
    if not grid or min(grid) < 0 or grid != sorted(set(grid)):
        raise UserError(f"--grid {args.grid!r} must be whole numbers from 0 up that grow, such as 0,10,50,100,200")
    if not 0 < args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold:g} must be above 0 and at most 1; the paper takes 0.9")
    for name in ("seeds", "workers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 1")
    try:
        lrs: list[float | None] = [None] if args.lrs is None else [float(part) for part in args.lrs.split(",")]
    except ValueError:
        lrs = [0.0]
    if any(lr is not None and not (0 < lr < math.inf) for lr in lrs) or len(set(lrs)) < len(lrs):
        raise UserError(f"--lrs {args.lrs!r} must be different numbers above 0, such as 1e-3,1e-2,1e-1")
    return Settings(
        grid, args.threshold, args.metric, args.mode, args.seeds, lrs, args.lr_key, args.projection,
        args.layer_scales, args.stop_early, args.workers, args.out.absolute(),
    )  # fmt: skip


def _require_rate(resolved: Resolved, key: str) -> None:
    if key not in resolved.sources:
        rates = [path for path in resolved.sources if path.split(".")[-1] == "lr"]
        raise UserError(
            f"--lrs sets {key}, and {resolved.name} has no such key; name it with --lr-key"
            + (f", for example {rates[0]}" if rates else "")
        )


def search(settings: Settings, references: dict[str, Any], train: Train) -> Curve:
    """The baseline, then the grid: all of it, or up to the line with `stop_early`. Raises: UserError as `run`."""
    untrained = {int(seed): value for seed, value in references["untrained"].items()}
    baseline = measure(settings, [None], train)[None]
    if not baseline.values:
        raise UserError(
            f"no run of the baseline finished with a value of {settings.metric}; the last lines of each are in "
            f"{settings.out / 'runs'}/direct*/{LOG}"
        )
    line = target(settings.threshold, settings.mode, baseline.mean, mean(untrained.values()))
    curve = Curve(settings.mode, line, baseline, {})
    if settings.grid[0] == 0:
        curve.points[0] = Point(untrained, None, {})
    rest = [dim for dim in settings.grid if dim > 0]
    for dims in [[dim] for dim in rest] if settings.stop_early else [rest]:
        if curve.reached is not None and settings.stop_early:
            break
        curve.points.update(measure(settings, dims, train))
    return curve


def measure(settings: Settings, dims: Sequence[int | None], train: Train) -> dict[Any, Point]:
    """The best rate of each dimension by the tuning seed, where there is a choice, and the seeds at that rate."""
    tried: dict[Fit, float] = {}
    if len(settings.lrs) > 1:
        tried = train([Fit(dim, lr, TUNING_SEED) for dim in dims for lr in settings.lrs])
    best = max if settings.mode == "max" else min
    chosen: dict[int | None, float | None] = {}
    for dim in dims:
        scores = {fit.lr: value for fit, value in tried.items() if fit.dim == dim and math.isfinite(value)}
        chosen[dim] = best(scores, key=scores.__getitem__) if scores else settings.lrs[0]
    found = train([Fit(dim, chosen[dim], seed) for dim in dims for seed in range(settings.seeds)])
    points = {}
    for dim in dims:
        values = {fit.seed: value for fit, value in found.items() if fit.dim == dim and math.isfinite(value)}
        tuning = {fit.lr: value for fit, value in tried.items() if fit.dim == dim and fit.lr is not None}
        points[dim] = Point(values, chosen[dim], tuning)
    return points


def _train(resolved: Resolved, settings: Settings, fits: Sequence[Fit]) -> dict[Fit, float]:
    """Runs that stand finished in the folder are kept, all others are done anew, `workers` at a time."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    runs = settings.out / "runs"
    waiting = [fit for fit in fits if not _finished(resolved, settings, fit)]
    commands = []
    for fit in waiting:
        remove(runs / fit.name)
        recipe = runs / f"{fit.name}.yaml"
        write_atomic(recipe, _recipe(resolved, settings, fit))
        commands.append((fit_command(recipe, runs / fit.name, resolved.allow_modules), runs / fit.name / LOG))
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": _threads(settings.workers)}
    console = Console(highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("runs", total=len(fits), completed=len(fits) - len(waiting))

        def ended(position: int, status: int) -> None:
            progress.update(task, advance=1, description=waiting[position].name)
            if status:
                log = commands[position][1]
                console.print(
                    f"{waiting[position].name} failed with status {status}, see {log}:\n{last_lines(log)}", markup=False
                )

        run_side_by_side(commands, settings.workers, ended, threads)
    return {fit: _value(runs / fit.name, settings.metric) for fit in fits}


def _threads(workers: int) -> str:
    return str(max(1, (os.cpu_count() or 1) // workers))


def _finished(resolved: Resolved, settings: Settings, fit: Fit) -> bool:
    """Whether the folder holds this run, whole. Raises: UserError where it holds another run of that name."""
    folder = settings.out / "runs" / fit.name
    try:
        finished = json.loads((folder / SUMMARY).read_text())["finished"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    recipe, wanted = folder.with_name(f"{fit.name}.yaml"), _recipe(resolved, settings, fit)
    if finished and recipe.is_file() and recipe.read_text() != wanted:
        import yaml

        found = differences([yaml.safe_load(recipe.read_text()), yaml.safe_load(wanted)])
        lines = "\n".join(f"  {key}: {before} -> {now}" for key, (before, now) in found[:10])
        raise UserError(
            f"{settings.out} holds a search with other settings (then -> now, in {fit.name}):\n{lines}\n"
            "Put them back, or give another --out DIR"
        )
    return finished


def _recipe(resolved: Resolved, settings: Settings, fit: Fit) -> str:
    return dump(with_layer(resolved, layer(resolved, settings, fit)).document())


def layer(resolved: Resolved, settings: Settings, fit: Fit) -> dict[str, Any]:
    """What a run changes in the recipe: seeds, subspace and rate, and nothing is kept that a torn run would need."""
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
        changed[ENTRY] = {"class_path": CALLBACK, "init_args": settings_of | {"path": "${run}/subspace.safetensors"}}
    jsonl = {"class_path": "lightspan.loggers.jsonl.JsonlLogger", "init_args": {"save_dir": "${run}"}}
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
    """The last value of the metric; NaN where the run logged none."""
    if not (folder / METRICS).is_file() or not (folder / SUMMARY).is_file():
        return math.nan
    points = load_run(folder, folder.name).points(metric)
    return points[-1].value if points else math.nan


def _references(resolved: Resolved, settings: Settings) -> dict[str, Any]:
    """What needs no training, kept in references.json. Raises: UserError for a metric that validation does not log, and
    for a grid beyond the weights.
    """
    from lightspan.intrinsic.references import references

    direct = with_layer(resolved, layer(resolved, settings, Fit(None, settings.lrs[0], 0)))
    path, wanted = settings.out / "references.json", {"recipe": dump(direct.document()), "seeds": settings.seeds}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = {}
    if {key: found.get(key) for key in wanted} != wanted:
        print("measuring what needs no training: the untrained network, a linear probe on its features", flush=True)
        seeds = {seed: Fit(0, None, seed).drawn() for seed in range(settings.seeds)}
        found = references(direct, seeds, settings.metric) | wanted
        write_atomic(path, json.dumps(found, indent=2) + "\n")
    if settings.grid[-1] > found["parameters"]:
        raise UserError(
            f"--grid ends at {settings.grid[-1]:,}, and {resolved.name} trains {found['parameters']:,} weights; a "
            "subspace has at most as many dimensions"
        )
    return found


def _write(resolved: Resolved, settings: Settings, references: dict[str, Any], curve: Curve) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lightspan.intrinsic.picture import picture

    shown = {key: references[key] for key in ("constant_answer", "linear_probe", "parameters")}
    shown["untrained"] = mean(references["untrained"].values())
    record = {
        "recipe": resolved.name,
        "metric": settings.metric,
        "mode": settings.mode,
        "threshold": settings.threshold,
        "projection": settings.projection,
        "layer_scales": settings.layer_scales,
        **shown,
        **curve.record(),
    }
    title = f"{_named(resolved)}: {settings.metric} in random subspaces of {shown['parameters']:,} weights"
    files: dict[Path, str | bytes] = {
        settings.out / "result.json": json.dumps(record, indent=2, allow_nan=False) + "\n",
        settings.out / "curve.png": picture(curve, settings.metric, settings.threshold, shown, title),
    }
    for path, content in files.items():
        write_atomic(path, content)
    table = Table(title=Text(title), title_justify="left")
    for column in ("d", "mean", "lowest", "highest", "lr"):
        table.add_column(column, justify="right")
    rows: list[tuple[int | None, Point]] = [(None, curve.baseline), *curve.points.items()]
    for dim, point in rows:
        values = point.values.values()
        cells = [_four(value) for value in (point.mean, min(values), max(values))] if values else ["failed", "", ""]
        rate = "" if point.lr is None else f"{point.lr:g}"
        style = "bold green" if dim is not None and dim == curve.reached else ""
        table.add_row("all weights" if dim is None else f"{dim:,}", *cells, rate, style=style)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    lines = [f"{what}: {_four(shown[key])}" for key, what in REFERENCES.items() if shown[key] is not None]
    console.print(
        f"line: {_four(curve.line)} ({settings.threshold:g} of {_WHOLE[settings.mode]})   " + "   ".join(lines)
    )
    reached = "no dimension of the grid reaches it" if curve.reached is None else f"reached at d = {curve.reached:,}"
    console.print(f"{reached}; by seed: {', '.join(str(d or 'not') for d in curve.by_seed().values())}")
    console.print(" ".join(["wrote", *map(str, files)]))


def _named(resolved: Resolved) -> str:
    """The recipe and, since flags may put another in its place, the class of its data."""
    data = resolved.config.get("data")
    return f"{resolved.name} on {data['class_path'].rpartition('.')[2]}" if data else resolved.name


_WHOLE = {"max": "the baseline", "min": "the way from untrained to the baseline"}
REFERENCES = {
    "untrained": "untrained",
    "constant_answer": "always the most frequent class",
    "linear_probe": "linear probe on frozen features",
}


def _four(value: float) -> str:
    return f"{value:.4g}"
