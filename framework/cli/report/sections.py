"""Which charts a set of runs gives: every metric that at least one run logged, in groups, one curve per run."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from lightspan.cli.report.chart import Chart, ChartLine
from lightspan.cli.report.curves import LONG, XY, finite, smooth
from lightspan.cli.report.runs import Run

_GROUPS = (
    ("val", "Validation", ("val",)),
    ("train", "Training", ("train",)),
    ("probe", "Probes", ("probe", "probes", "knn", "linear")),
    ("collapse", "Signs of collapse", ("collapse",)),
    ("lr", "Learning rates", ("lr",)),
    ("throughput", "Throughput", ("throughput", "time", "step")),
    ("memory", "Memory", ("memory",)),
    ("dimension", "Dimensions", ("dimension",)),
    ("mask", "Masks", ("mask",)),
    ("spectrum", "Spectra", ("spectrum", "spectra")),
    ("other", "Other metrics", ()),
)
_PROFILED = ("dimension", "mask")  # groups that also have a figure for each matrix
_NAMED = 12  # matrices; of more only the first and the last are named
_UNITS = (
    ("bits_per_byte", "bits per byte"),
    ("_nats", "nats"),
    ("_mib", "MiB"),
    ("_gib", "GiB"),
    ("_ms", "ms"),
    ("_per_s", "per second"),
    ("_per_sec", "per second"),
    ("per_second", "per second"),
    ("_seconds", "s"),
    ("_s", "s"),
    ("_energy", "share"),
    ("mask/density", "share"),
    ("mask/churn", "share"),
    ("_rank", "dimensions"),
    ("rankme", "dimensions"),
    ("lidar", "dimensions"),
    ("collapse/duplicates", "share"),
    ("dead_dimensions", "share"),
    ("participation_ratio", "dimensions"),
    ("_nn", "dimensions"),
    ("acc", "fraction correct"),
    ("accuracy", "fraction correct"),
)

MOST_CHARTS = 100
"""Of a group: a run that logs more metrics, such as one for each class, has a page that still opens."""


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    charts: list[Chart]
    more: int = 0
    """Metrics of this kind that have no chart, since there are more than `MOST_CHARTS`."""


def sections(runs: Sequence[Run]) -> list[Section]:
    """The non-empty groups in reading order: validation first, then training, probes and costs."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics()))
    found = {key: [name for name in metrics if group_of(name) == key] for key, _, _ in _GROUPS}
    out = []
    for key, title, _ in _GROUPS:
        alone = [name for name in found[key] if not _profiled(name)]
        charts = [_over_steps(runs, name) for name in alone[:MOST_CHARTS]]
        if key == "val" and charts:
            charts[1:1] = [_over_time(runs, found[key][0]), *_against_first(runs, found[key][0])]
        if key == "spectrum":
            charts = _spectra(runs) + charts
        if key in _PROFILED:
            charts += _profiles(runs, found[key])
        charts = [
            chart for chart in charts if any(finite(curve.points) for curve in chart.curves) or chart.title in metrics
        ]
        if charts:
            out.append(Section(key, title, charts, max(0, len(alone) - MOST_CHARTS)))
    return out


def _profiled(metric: str) -> bool:
    """Whether a metric is that of one matrix, GROUP/MEASURE/MATRIX: a network has too many for a chart each."""
    return group_of(metric) in _PROFILED and metric.count("/") > 1


@functools.lru_cache(maxsize=2**16)
def group_of(metric: str) -> str:
    """The group of a metric, by its first word: `val/loss_nats`, `val_loss`, `lr-AdamW`."""
    head = metric.split("/")[0]
    for key, _, words in _GROUPS:
        if head in words:
            return key
    for key, _, words in _GROUPS:
        if any(head.startswith((f"{word}_", f"{word}-")) for word in words):
            return key
    return "other"


def unit_of(metric: str) -> str:
    """The unit at the end of a metric's name, or "" if there is none."""
    if group_of(metric) == "lr":
        return "rate"
    return next((unit for ending, unit in _UNITS if metric.endswith(ending)), "")


def _over_steps(runs: Sequence[Run], metric: str) -> Chart:
    curves, note = [], ""
    for at, run in enumerate(runs):
        logged = run.points(metric)
        points = [(float(point.step), point.value) for point in logged]
        if not points:
            continue
        spreads = [(float(point.step), point.spread) for point in logged if point.spread is not None]
        smoothed: list[tuple[float, float]] = []
        if group_of(metric) in ("train", "throughput") and len(finite(points)) >= LONG:
            span = max(5, round(len(points) / 40))
            smoothed, spreads = smooth(finite(points), span), smooth(finite(spreads), span)
            note = f"thin: every logged value; thick: running mean over {span} of them"
        curves.append(ChartLine(run.name, at, points, smoothed, _band(smoothed or points, spreads)))
    if any(curve.band for curve in curves):
        note = "; ".join(filter(None, [note, "surface: one standard deviation over seeds to either side"]))
    return Chart(metric, "optimiser steps", unit_of(metric), curves, note=note)


def _band(points: Sequence[XY], spreads: Sequence[XY]) -> list[tuple[float, float, float]]:
    """One standard deviation to either side of a curve, where it is known."""
    middle = dict(points)
    return [(x, middle[x] - spread, middle[x] + spread) for x, spread in spreads if x in middle]


def _over_time(runs: Sequence[Run], metric: str) -> Chart:
    curves = [
        ChartLine(run.name, at, [(point.time_s, point.value) for point in run.points(metric)])
        for at, run in enumerate(runs)
    ]
    kept = [curve for curve in curves if finite(curve.points)]
    return Chart(f"{metric} by wall time", "seconds since the fit began", unit_of(metric), kept)


def _against_first(runs: Sequence[Run], metric: str) -> list[Chart]:
    """How far other runs are from the first at the same steps: shows differences too small for the curves."""
    first = {point.step: point.value for point in runs[0].points(metric)}
    curves = []
    for at, run in enumerate(runs[1:], start=1):
        shared = [(float(p.step), p.value - first[p.step]) for p in run.points(metric) if p.step in first]
        if finite(shared):
            curves.append(ChartLine(run.name, at, shared))
    title, note = f"{metric} minus that of {runs[0].name}", "at steps where both logged it"
    return [Chart(title, "optimiser steps", unit_of(metric), curves, note=note)] if curves else []


def _spectra(runs: Sequence[Run]) -> list[Chart]:
    spectra = [run.spectra() for run in runs]
    charts = []
    for name in dict.fromkeys(name for found in spectra for name in found):
        curves = [ChartLine(run.name, at, spectra[at][name][1]) for at, run in enumerate(runs) if name in spectra[at]]
        steps = dict.fromkeys(str(found[name][0]) for found in spectra if name in found)
        note = f"as logged at step {', '.join(steps)}"
        charts.append(Chart(name, "index", "value", curves, log_y=True, note=note))
    return charts


def _profiles(runs: Sequence[Run], metrics: Sequence[str]) -> list[Chart]:
    """The last values of GROUP/MEASURE/MATRIX over the matrices, in the order in which they were logged."""
    measures: dict[str, list[str]] = {}
    for name in filter(_profiled, metrics):
        measures.setdefault("/".join(name.split("/")[:2]), []).append(name)
    charts = []
    for measure, names in measures.items():
        last = [{at: run.points(name)[-1:] for at, name in enumerate(names)} for run in runs]
        curves = [
            ChartLine(run.name, at, [(float(x), point.value) for x, points in last[at].items() for point in points])
            for at, run in enumerate(runs)
        ]
        own = [f"{at} is {name.removeprefix(f'{measure}/')}" for at, name in enumerate(names)]
        note = f"last values; {', '.join(own if len(own) <= _NAMED else (own[0], own[-1]))}"
        drawn = [curve for curve in curves if finite(curve.points)]
        charts.append(Chart(f"{measure} by matrix", "matrix", unit_of(measure), drawn, note=note, things=len(names)))
    return charts
