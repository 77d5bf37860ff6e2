"""`lightspan intrinsic-dimension`: d90 of a recipe, the smallest random subspace in which it reaches most of what it
reaches when all its weights are trained. The search itself is `lightspan.cli.studies.dimension`.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

from lightspan.cli.commands.arguments import add_data_arguments, add_recipe_arguments, folder, resolved_from
from lightspan.cli.config.resolve import Resolved
from lightspan.cli.runs.fits import exits_on_sigterm
from lightspan.cli.runs.folder import run_folder
from lightspan.cli.studies.dimension.curve import Curve, Point
from lightspan.cli.studies.dimension.fits import recipe_of, references_of, require_rate, train
from lightspan.cli.studies.dimension.search import Fit, SearchSettings, search
from lightspan.core.drawing import canvas, png, tidy
from lightspan.core.errors import UserError, print_notes
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.runs import CURVE, RESULT

NOT_REACHED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument(
        "--grid", required=True, metavar="0,10,50", help="dimensions in ascending order; 0 is the untrained network"
    )
    parser.add_argument("--threshold", type=float, default=0.9, help="share of the baseline to reach (default 0.9)")
    parser.add_argument("--metric", default="val/accuracy", help="a metric that validation logs (default val/accuracy)")
    parser.add_argument(
        "--mode", choices=("max", "min"), default="max", help="whether larger or smaller is better (default max)"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs for each dimension (default 3)")
    parser.add_argument(
        "--lrs", metavar="1e-3,1e-2", help="learning rates to choose from, for each dimension and the baseline"
    )
    parser.add_argument(
        "--lr-key",
        default="model.init_args.optimizer.init_args.lr",
        metavar="KEY",
        help="key of the recipe's learning rate (default model.init_args.optimizer.init_args.lr)",
    )
    parser.add_argument(
        "--projection",
        default="lightspan.subspaces.projections.Fastfood",
        metavar="CLASS",
        help="class path of the random map: Fastfood (default), Dense or Sparse of lightspan.subspaces.projections",
    )
    parser.add_argument("--layer-scales", action="store_true", help="also learn a factor for each layer (SAID)")
    parser.add_argument("--stop-early", action="store_true", help="end at the first dimension that reaches the share")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at the same time (default 1)")
    parser.add_argument(
        "--out", type=folder, default=Path("intrinsic-dimension"), metavar="DIR", help="folder for all runs and results"
    )


def run(args: argparse.Namespace) -> int:
    """0 if a dimension of the grid reaches the line, 1 if none does. Raises: UserError for what cannot be searched,
    and if every learning rate of the baseline fails.
    """
    settings = _settings(args)
    resolved = resolved_from(args)
    print_notes(resolved.notes)
    if settings.lrs != [None]:
        require_rate(resolved, settings.lr_key)
    recipe_of(resolved, settings, Fit(settings.grid[-1], settings.lrs[0], 0))  # complains before anything starts
    run_folder(settings.out, resolved.name)  # refuses links out of it
    with exits_on_sigterm():
        references = references_of(resolved, settings)
        curve = search(settings, references, lambda fits: train(resolved, settings, fits))
    _write(resolved, settings, references, curve)
    return 0 if curve.reached is not None else NOT_REACHED


def _settings(args: argparse.Namespace) -> SearchSettings:
    try:
        grid = [int(part) for part in args.grid.split(",")]
    except ValueError:
        grid = []
    if not grid or min(grid) < 0 or grid != sorted(set(grid)):
        raise UserError(
            f"--grid {args.grid!r} must be whole numbers from 0 up in ascending order, such as 0,10,50,100,200"
        )
    if not 0 < args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold:g} must be above 0 and at most 1; the paper uses 0.9")
    for name in ("seeds", "workers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 1")
    try:
        lrs: list[float | None] = [None] if args.lrs is None else [float(part) for part in args.lrs.split(",")]
    except ValueError:
        lrs = [0.0]
    if any(lr is not None and not (0 < lr < math.inf) for lr in lrs) or len(set(lrs)) < len(lrs):
        raise UserError(f"--lrs {args.lrs!r} must be different numbers above 0, such as 1e-3,1e-2,1e-1")
    return SearchSettings(
        grid, args.threshold, args.metric, args.mode, args.seeds, lrs, args.lr_key, args.projection,
        args.layer_scales, args.stop_early, args.workers, args.out.absolute(),
    )  # fmt: skip


def _write(resolved: Resolved, settings: SearchSettings, references: dict[str, Any], curve: Curve) -> None:
    from rich.table import Table
    from rich.text import Text

    from lightspan.core.console import SafeConsole

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
    figure, ((axes,),) = canvas(title, (7.4, 4.4))
    curve.draw(axes, settings.metric, settings.threshold, shown)
    tidy(axes)
    files: dict[Path, str | bytes] = {
        settings.out / RESULT: json.dumps(record, indent=2, allow_nan=False) + "\n",
        settings.out / CURVE: png(figure),
    }
    for path, content in files.items():
        write_atomic(path, content, setting="--out")
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
    console = SafeConsole(highlight=False, soft_wrap=True)
    console.print(table)
    lines = [f"{what}: {_four(shown[key])}" for key, what in REFERENCES.items() if shown[key] is not None]
    console.print(
        f"line: {_four(curve.line)} ({settings.threshold:g} of {_WHOLE[settings.mode]})   " + "   ".join(lines)
    )
    reached = "no dimension of the grid reaches it" if curve.reached is None else f"reached at d = {curve.reached:,}"
    console.print(f"{reached}; by seed: {', '.join(str(d or 'not') for d in curve.by_seed().values())}")
    console.print(" ".join(["wrote", *map(str, files)]))


def _named(resolved: Resolved) -> str:
    """The recipe and, since flags may replace them, the class of its data."""
    data = resolved.config.get("data")
    return f"{resolved.name} on {data['class_path'].rpartition('.')[2]}" if data else resolved.name


_WHOLE = {"max": "the baseline", "min": "the distance from untrained to the baseline"}
REFERENCES = {
    "untrained": "untrained",
    "constant_answer": "always the most frequent class",
    "linear_probe": "linear probe on frozen features",
}


def _four(value: float) -> str:
    return f"{value:.4g}"
