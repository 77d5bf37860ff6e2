"""Runs in the order of one metric, with the settings in which they differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lightspan.config.key_names import short_names
from lightspan.errors import UserError
from lightspan.report.compare import differences, number
from lightspan.report.fold import without_seeds
from lightspan.report.runs import Run
from lightspan.report.sections import group_of
from lightspan.runs.direction import Mode, better, mode_of

MOST_SETTINGS = 6  # columns


@dataclass(frozen=True)
class RankedRun:
    """A run and the last value of the metric, with its standard deviation over seeds; NaN and None if there is none."""

    run: Run
    value: float
    spread: float | None

    def text(self) -> str:
        """The value as a reader sees it."""
        if math.isnan(self.value):
            return "—"
        return number(self.value, 4) + ("" if self.spread is None else f" ± {number(self.spread, 4)}")


@dataclass(frozen=True)
class Ranking:
    """Runs from the best last value of a metric to the worst; those without a finite one come last."""

    metric: str
    mode: Mode
    places: list[RankedRun]

    @property
    def first(self) -> str:
        """Which value comes first: "lowest" or "highest"."""
        return "lowest" if self.mode == "min" else "highest"


def ranked(runs: Sequence[Run], metric: str | None = None, mode: Mode | None = None) -> Ranking | None:
    """The runs ranked, by default by the first validation loss, or else the first score of validation, that they
    logged; None if they have none, or its name does not tell whether low or high is good.

    Raises: UserError for a `metric` that none of them logged, or whose direction only `mode` can tell.
    """
    logged = list(dict.fromkeys(name for run in runs for name in run.metrics()))
    if metric is not None and metric not in logged:
        raise UserError(f"--metric {metric}: no run logged it; they logged {', '.join(logged)}")
    scores = [name for name in logged if group_of(name) == "val" and better(name) != "neither"]
    scores.sort(key=lambda name: better(name) != "lower")
    chosen = metric or next(iter(scores), None)
    if chosen is None:
        return None
    direction = mode_of(chosen, mode, "--metric")
    sign = 1 if direction == "min" else -1
    places = [_place(run, chosen) for run in runs]
    places.sort(key=lambda place: math.inf if math.isnan(place.value) else sign * place.value)
    return Ranking(chosen, direction, places)


def _place(run: Run, metric: str) -> RankedRun:
    points = run.points(metric)
    if not points or not math.isfinite(points[-1].value):
        return RankedRun(run, math.nan, None)
    return RankedRun(run, points[-1].value, points[-1].spread)


def ranking_table(ranking: Ranking) -> str:
    """The ranking as HTML: place, run, what differs, value, steps and time."""
    settings, left_out = settings_of(ranking)
    heads = ["", "run", *(escape(name) for name, _ in settings), f"{escape(ranking.metric)}", "steps", "seconds"]
    lines = []
    for at, place in enumerate(ranking.places):
        finite = not math.isnan(place.value)
        best = ' class="best"' if at == 0 and finite else ""
        cells = [
            f'<td>{at + 1 if finite else ""}</td><th scope="row">{escape(place.run.name)}</th>',
            *(f"<td>{escape(values[at])}</td>" for _, values in settings),
            f"<td{best}>{escape(place.text())}</td>",
            *(f"<td>{escape(_figure(place.run, key))}</td>" for key in ("steps", "seconds")),
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    notes = [f"By the last value of {ranking.metric}, the {ranking.first} first"]
    if any(place.spread is not None for place in ranking.places):
        notes.append("± is the standard deviation over seeds")
    if left_out:
        notes.append(f"{left_out} more settings differ; they are listed below")
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return (
        f'<h2>Ranking</h2><div class="scroll"><table class="rank"><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="note">{escape("; ".join(notes))}.</p>'
    )


def settings_of(ranking: Ranking) -> tuple[list[tuple[str, list[str]]], int]:
    """(short key, value at each place) of the settings that differ, those with the most different values first, and
    how many there are beyond `MOST_SETTINGS`.
    """
    changed = differences([without_seeds(place.run.config) for place in ranking.places])
    changed.sort(key=lambda one: -len(set(one[1])))
    names = short_names([key for key, _ in changed])
    return [(names[key], values) for key, values in changed[:MOST_SETTINGS]], max(0, len(changed) - MOST_SETTINGS)


def _figure(run: Run, key: str) -> str:
    value = run.summary.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return "—"
    return number(round(float(value)))
