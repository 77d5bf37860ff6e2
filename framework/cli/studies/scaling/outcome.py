"""What is said when the runs of a curve have ended: scores by size, the fits, ten times the data, JSON and a figure."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from lightspan.cli.config.flags import allow_options
from lightspan.cli.runs.figures import SeedScores, scores
from lightspan.cli.runs.numbers import SCORE_DIGITS, number, spread_text
from lightspan.cli.runs.status import Status, status_of
from lightspan.cli.studies.scaling.figure import drawn
from lightspan.cli.studies.scaling.study import SIZE_KEY, Study, sizes_of, write
from lightspan.cli.studies.sweeps.files import Sweep
from lightspan.cli.studies.sweeps.outcome import print_unfinished
from lightspan.cli.studies.sweeps.ranking import by_point, score, unlogged
from lightspan.core.console import SafeConsole
from lightspan.core.errors import print_notes, printable
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.runs import SCALING, SCALING_PICTURE
from lightspan.evaluation.scaling_laws import FEWEST_SIZES, FormFit, Interval, ScalingCurve, scaling_curve


@dataclass(frozen=True)
class Outcome:
    """What the runs reached, and what follows from it.

    Attributes:
        points: size -> what its runs count for.
        curve: of the seeds that count at every size; None for fewer than three sizes, or no such seed.
        notes: what a reader has to know.
    """

    points: Mapping[int, SeedScores]
    curve: ScalingCurve | None
    notes: tuple[str, ...]


def outcome_of(sweep: Sweep, folder: Path, top: float | None, guess_top: bool) -> Outcome:
    """Reads the runs of a folder.

    Args:
        top: the score of a perfect model; None compares scores as they are.
        guess_top: take 1 instead where higher is better and all scores lie in [0, 1].
    """
    assert sweep.metric is not None
    points = {
        trials[0].values[SIZE_KEY]: scores({trial.seed: score(folder / trial.run, sweep.metric) for trial in trials})
        for trials in by_point(sweep)
    }
    seeds = [seed for seed in sweep.seeds or () if all(seed in point.values for point in points.values())]
    left_out = [seed for seed in sweep.seeds or () if seed not in seeds]
    notes = []
    if left_out:
        said = ", ".join(map(str, left_out))
        notes.append(f"the fits leave out seed {said}, of which not every size has a score")
    if not seeds or len(points) < FEWEST_SIZES:
        return Outcome(points, None, tuple(notes))
    table_SK = np.array([[point.values[seed] for point in points.values()] for seed in seeds])
    if guess_top and sweep.mode == "max" and table_SK.min() >= 0 and table_SK.max() <= 1:
        top = 1.0
    curve = scaling_curve([*points], table_SK, top)
    return Outcome(points, curve, (*notes, *curve.notes))


def conclude(study: Study, sweep: Sweep, folder: Path, top: float | None, guess_top: bool) -> bool:
    """Prints the outcome and writes scaling.json and scaling.png; whether every run is done."""
    console = SafeConsole(highlight=False, soft_wrap=True)
    undone = [trial for trial in sweep.trials if status_of(folder / trial.run) is not Status.DONE]
    if sweep.metric is not None:
        found = outcome_of(sweep, folder, top, guess_top)
        console.print(_points_table(sweep, found.points))
        if found.curve is not None:
            console.print(_forms_table(found.curve))
            for line in _sentences(found.curve):
                console.print(line, markup=False)
        console.print(study.text(), markup=False)
        for note in found.notes:
            console.print(f"note: {note}", markup=False)
        if not any(point.values for point in found.points.values()):
            done = [trial.run for trial in sweep.trials if trial not in undone]
            print_notes(said for run in done[:1] if (said := unlogged(folder / run, sweep.metric)))
        write(folder, study, _record(sweep, found))
        if found.curve is not None:
            title = f"{sweep.recipe}: {sweep.metric} by training samples"
            picture = drawn(title, sweep.metric, found.points, found.curve, study.text())
            write_atomic(folder / SCALING_PICTURE, picture)
            console.print(f"wrote {folder / SCALING} {folder / SCALING_PICTURE}", markup=False)
    again = ["scaling", str(folder), *allow_options(sweep.modules)]
    if undone:
        print_unfinished(undone, folder)
        failed = any(status_of(folder / trial.run) is Status.FAILED for trial in undone)
        again += ["--retry-failed"] if failed else []
    else:
        again += ["--sizes", str(min(10 * sizes_of(sweep)[-1], study.samples))]
    print(printable(f"{'not finished' if undone else 'done'}: {folder}"))
    print(printable(f"next: lightspan report {shlex.quote(str(folder))}"))
    # How many samples drawn classes have differs by seed.
    if undone or (study.classes is None and study.samples > sizes_of(sweep)[-1]):
        print(printable(f"      lightspan {shlex.join(again)}"))
    return not undone


def _points_table(sweep: Sweep, points: Mapping[int, SeedScores]) -> Table:
    order = "lower is better" if sweep.mode == "min" else "higher is better"
    table = Table(title=Text(f"{sweep.metric} by training samples, {order}"), title_justify="left")
    for name in ("samples", "mean", "spread", "n"):
        table.add_column(name, justify="right")
    for size, point in points.items():
        spread = "" if math.isnan(point.spread) else spread_text(point.spread)
        n = f"{len(point.values)}" + ("" if point.complete else f" of {point.runs}")
        table.add_row(f"{size:,}", number(point.mean, SCORE_DIGITS) if point.values else "", spread, n)
    return table


def _forms_table(curve: ScalingCurve) -> Table:
    what = "difference" if curve.top is None else "difference of ln error"
    table = Table(title=Text(f"fits; left out: {what} at the largest size, fitted without it"), title_justify="left")
    for name in ("form", "left out", f"at {10 * curve.sizes[-1]:,}", "95 %", "numbers"):
        table.add_column(name, justify="left" if name in ("form", "numbers") else "right")
    for one in curve.fits:
        far = one.at(10 * curve.sizes[-1])
        cells = [f"{one.left_out:.3g}", f"{far.value:.4g}", _ends(far), ", ".join(_numbers(one))]
        table.add_row(one.law.form.name, *cells, style="bold green" if one is curve.best else "")
    return table


def _numbers(one: FormFit) -> list[str]:
    return [f"{name} {interval.value:.4g}" for name, interval in one.numbers().items()]


def _sentences(curve: ScalingCurve) -> list[str]:
    b, far = curve.per_decade, curve.tenfold
    return [
        f"per decade: {b.value:+.4g}{_within(b)}, along a straight line in log10 of the samples",
        f"ten times the data ({10 * curve.sizes[-1]:,}): {far.value:.4g}{_within(far)}, by the "
        f"{curve.best.law.form.name}, {curve.best.law.form.text}",
    ]


def _within(interval: Interval) -> str:
    return "" if interval.low is None else f", 95 % interval {_ends(interval)}"


def _ends(interval: Interval) -> str:
    return "" if interval.low is None else f"{interval.low:.4g} to {interval.high:.4g}"


def _record(sweep: Sweep, found: Outcome) -> dict[str, Any]:
    curve = found.curve
    record: dict[str, Any] = {
        "metric": sweep.metric,
        "mode": sweep.mode,
        "scores": {
            str(size): {str(seed): x for seed, x in point.values.items()} for size, point in found.points.items()
        },
        "notes": list(found.notes),
    }
    if curve is None:
        return record
    far = 10 * curve.sizes[-1]
    fits = {
        one.law.form.name: {
            "equation": one.law.form.text,
            "numbers": {name: interval.record() for name, interval in one.numbers().items()},
            "left_out": one.left_out,
            "tenfold": one.at(far).record(),
        }
        for one in curve.fits
    }
    return record | {
        "top": curve.top,
        "fits": fits,
        "best": curve.best.law.form.name,
        "per_decade": curve.per_decade.record(),
        "tenfold": {"samples": far} | curve.tenfold.record(),
    }
