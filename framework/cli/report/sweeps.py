"""What a sweep shows: its runs as points, a heat map of two of its keys, and a slice along each key."""

import math
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from lightspan.cli.report.chart import Chart, ChartLine, draw
from lightspan.cli.report.markup import escape
from lightspan.cli.report.ranking import RankedRun, Ranking
from lightspan.cli.report.runs import MOST_PICTURE_BYTES, PNG_MARK, Run, load_run, unique_names
from lightspan.cli.report.sections import unit_of
from lightspan.cli.runs.status import Status, status_of
from lightspan.cli.studies.sweeps.files import Sweep, Trial, read
from lightspan.cli.studies.sweeps.points import Range, written
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import read_small, refuse_link_out
from lightspan.core.files.runs import SCALING_PICTURE, SWEEP

MOST_VALUES = 12  # of a key in a heat map
WIDE = 30  # the ratio of a key's values from which on they are drawn over their logarithm
MOST_MAPS, MOST_FAILED = 12, 5

Points = list[tuple[dict[str, Any], RankedRun]]


@dataclass(frozen=True)
class SweepRuns:
    """A sweep in a report.

    Attributes:
        folder: with sweep.json.
        values: run folder -> the settings of its trial, for those trials whose runs are in the report.
        missing: what became of the runs of the other trials, by their names.
    """

    folder: Path
    sweep: Sweep
    values: dict[Path, dict[str, Any]]
    missing: dict[str, Status]


def load(folders: Sequence[Path]) -> tuple[list[Run], list[SweepRuns]]:
    """The runs of folders, each of which is a run or a whole sweep, and the sweeps that they belong to.

    A run of a sweep goes by its settings. A sweep that is named as a whole may have trials without figures.
    Raises: UserError as `load_runs`, and for a sweep of which no trial has figures.
    """
    given = list(dict.fromkeys(folders))
    names = dict(zip(given, unique_names(given), strict=True))
    sweeps: dict[Path, SweepRuns] = {}
    runs: list[Run] = []
    for folder in given:
        if (folder / SWEEP).is_file():
            runs += _all_of(_sweep_at(folder, sweeps))
        elif (folder.parent / SWEEP).is_file():
            runs += _one_of(_sweep_at(folder.parent, sweeps), folder, names[folder])
        else:
            runs.append(load_run(folder, names[folder]))
    return runs, list(sweeps.values())


def _sweep_at(folder: Path, known: dict[Path, SweepRuns]) -> SweepRuns:
    refuse_link_out(folder / SWEEP, folder, "its sweep")
    return known.setdefault(folder, SweepRuns(folder, read(folder), {}, {}))


def _all_of(found: SweepRuns) -> list[Run]:
    runs = []
    for trial in found.sweep.trials:
        run = _inside(found.folder, trial)
        if run in found.values:  # was named itself
            continue
        try:
            loaded = load_run(run, _label(found.sweep, trial))
        except UserError:
            found.missing[trial.run] = status_of(run)
        else:
            found.values[run] = trial.values
            runs.append(replace(loaded, draws=len(found.sweep.seeds or (None,))))
    if not found.values:
        raise UserError(f"no run of the sweep {found.folder} has figures yet: {_counts(found) or 'it has no trials'}")
    return runs


def _inside(folder: Path, trial: Trial) -> Path:
    """The run folder of a trial. Raises: UserError if it is a link out of the sweep, which may come from others."""
    refuse_link_out(run := folder / trial.run, folder, "its sweep")
    return run


def _one_of(found: SweepRuns, folder: Path, name: str) -> list[Run]:
    trial = next((trial for trial in found.sweep.trials if trial.run == folder.name), None)
    if trial is None:
        return [load_run(folder, name)]
    _inside(found.folder, trial)
    if folder in found.values:
        return []
    found.values[folder] = trial.values
    return [load_run(folder, _label(found.sweep, trial))]


def _counts(found: SweepRuns) -> str:
    """How many runs without figures there are of each status, and the first ones of those that failed."""
    failed = [name for name, status in found.missing.items() if status is Status.FAILED]
    counts = Counter(found.missing.values())
    said = [f"{count} {status}" for status, count in counts.items()]
    return ", ".join(said) + (f" ({', '.join(failed[:MOST_FAILED])})" if failed else "")


def _label(sweep: Sweep, trial: Trial) -> str:
    parts = [f"{sweep.label(key)}={written(value)}" for key, value in trial.values.items()]
    return ", ".join([*(parts or [sweep.recipe]), *([] if trial.seed is None else [f"seed {trial.seed}"])])


def sweep_section(found: SweepRuns, ranking: Ranking) -> str:
    """The sweep as HTML: what it ran through, a heat map for each two keys with few values, a slice for each key."""
    sweep = found.sweep
    through = ", ".join(f"{sweep.label(key)} = {axis.text()}" for key, axis in sweep.keys.items())
    seeds = f"; seeds {', '.join(map(str, sweep.seeds))}" if sweep.seeds else ""
    lead = f"{sweep.method} of {through}{seeds}" if through else seeds.removeprefix("; ")
    points = _points(found, ranking)
    maps = [_heat_map(sweep, pair, points, ranking) for pair in _pairs(sweep, points)][:MOST_MAPS]
    slices = [draw(_slice(sweep, key, points, ranking)) for key in sweep.keys if len(_values_of(sweep, key)) > 1]
    note = ""
    if found.missing:
        text = f"{len(found.missing)} of {len(sweep.trials)} runs have no figures: {_counts(found)}"
        note = f'<p class="note">{escape(text)}.</p>'
    return (
        f'<h2>Sweep of {escape(sweep.recipe)}</h2><p class="lead">{escape(lead)}</p>{note}'
        f'{_figure(found.folder)}<div class="heats">{"".join(maps)}</div><div class="charts">{"".join(slices)}</div>'
    )


def _figure(folder: Path) -> str:
    """The figure of a curve over sizes of the data, where `lightspan scaling` drew one."""
    path = folder / SCALING_PICTURE
    content = None if path.is_symlink() else read_small(path, MOST_PICTURE_BYTES)
    if content is None or not content.startswith(PNG_MARK):
        return ""
    return (
        '<div class="pictures"><img alt="the score over the number of training samples, and at ten times the data" '
        f'src="data:image/png;base64,{b64encode(content).decode()}"></div>'
    )


def _points(found: SweepRuns, ranking: Ranking) -> list[tuple[dict[str, Any], RankedRun]]:
    """(settings, place) of every run of this sweep, best first."""
    return [(found.values[one.run.folder], one) for one in ranking.places if one.run.folder in found.values]


def _values_of(sweep: Sweep, key: str) -> list[Any]:
    """The different values of a key, numbers in their order."""
    values = {written(trial.values[key]): trial.values[key] for trial in sweep.trials}.values()
    return sorted(values) if all(map(_is_number, values)) else list(values)


def _pairs(sweep: Sweep, points: Points) -> list[tuple[str, str]]:
    """The keys of which a heat map can be drawn: with few values each, and runs in at least half of its cells."""
    few = [key for key in sweep.keys if 2 <= len(_values_of(sweep, key)) <= MOST_VALUES]
    return [
        (one, other)
        for one, other in combinations(few, 2)
        if 2 * len(_cells(one, other, points)) >= len(_values_of(sweep, one)) * len(_values_of(sweep, other))
    ]


def _cells(down: str, across: str, points: Points) -> dict[tuple[str, str], RankedRun]:
    """The best run of each cell. Points come best first."""
    cells: dict[tuple[str, str], RankedRun] = {}
    for settings, place in points:
        cells.setdefault((written(settings[down]), written(settings[across])), place)
    return cells


def _heat_map(sweep: Sweep, pair: tuple[str, str], points: Points, ranking: Ranking) -> str:
    """A table whose cells are greener the better their best run is, by rank, so that one bad run hides nothing. Equal
    values are equally green.
    """
    down, across = pair
    cells = _cells(down, across, points)
    shown = [place for _, place in points if place in cells.values()]
    numbers = {id(place): number for place, number in zip(shown, ranking.standings(shown), strict=True)}
    columns = _values_of(sweep, across)
    lines = []
    for value in _values_of(sweep, down):
        texts = []
        for column in columns:
            place = cells.get((written(value), written(column)))
            number = None if place is None else numbers[id(place)]
            if place is None or number is None:
                texts.append(f'<td style="--share:0%">{"—" if place else ""}</td>')
                continue
            share = 50 * (1 - (number - 1) / max(1, len(shown) - 1))
            best = ' class="best"' if number == 1 else ""
            texts.append(f'<td{best} style="--share:{share:.0f}%">{escape(place.text())}</td>')
        lines.append(f'<tr><th scope="row">{escape(written(value))}</th>{"".join(texts)}</tr>')
    heads = "".join(f'<th scope="col">{escape(written(column))}</th>' for column in columns)
    others = "" if len(sweep.keys) == 2 else ", the best over the other keys"
    caption = f"{ranking.metric}{others}; {sweep.label(down)} downwards, {sweep.label(across)} across"
    return (
        f'<div class="scroll"><table class="heat"><caption>{escape(caption)}</caption>'
        f"<thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _slice(sweep: Sweep, key: str, points: Points, ranking: Ranking) -> Chart:
    """All runs that count over the values of one key, and the best of each value joined by a line."""
    values = _values_of(sweep, key)
    numeric = all(map(_is_number, values))
    axis = sweep.keys[key]
    at = {written(value): float(value) if numeric else float(place) for place, value in enumerate(values)}
    dots = [(at[written(settings[key])], place.value) for settings, place in points if not math.isnan(place.value)]
    best: dict[float, float] = {}
    for x, y in dots:
        best.setdefault(x, y)
    curves = [ChartLine("all runs", 0, dots, joined=False)]
    if len(best) < len(dots) or len(values) <= MOST_VALUES:
        curves.append(ChartLine("best", 1, sorted(best.items()), joined=numeric))
    notes = [] if numeric else [", ".join(f"{place} is {written(value)}" for place, value in enumerate(values))]
    if len(sweep.keys) > 1:
        notes.append("line: the best run of each value; the other keys vary")
    if len(dots) < len(points):
        notes.append(f"{len(points) - len(dots)} of {len(points)} runs have no value that counts")
    return Chart(
        f"{ranking.metric} by {sweep.label(key)}",
        sweep.label(key),
        unit_of(ranking.metric),
        curves,
        log_x=numeric
        and min(values) > 0
        and (max(values) > WIDE * min(values) or (isinstance(axis, Range) and axis.log)),
        note="; ".join(notes),
        things=0 if numeric else len(values),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
