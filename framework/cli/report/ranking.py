"""Runs in the order of one metric, with the settings in which they differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightspan.cli.config.key_names import short_names
from lightspan.cli.report.compare import differences
from lightspan.cli.report.fold import without_seeds
from lightspan.cli.report.markup import escape
from lightspan.cli.report.runs import Run
from lightspan.cli.report.sections import group_of
from lightspan.cli.runs.direction import Mode, better, mode_of
from lightspan.cli.runs.figures import SeedScores, ended, figure, scores, standings
from lightspan.cli.runs.numbers import SCORE_DIGITS, number, spread_text
from lightspan.core.errors import UserError

MOST_SETTINGS = 6  # columns


@dataclass(frozen=True)
class RankedRun:
    """A run, and what it counts for by the metric (see `lightspan.cli.runs.figures`); of a folded run over its members.

    Attributes:
        so_far: the last value of a single run that goes on or did not reach its end, which counts for nothing; NaN if
            there is none.
    """

    run: Run
    scores: SeedScores
    so_far: float = math.nan

    @property
    def value(self) -> float:
        """NaN if it counts for nothing."""
        return self.scores.mean

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None for fewer than two."""
        return None if math.isnan(self.scores.spread) else self.scores.spread

    def text(self) -> str:
        """The value as a reader sees it, with the number of seeds where some do not count."""
        if math.isnan(self.value):
            return "—" if math.isnan(self.so_far) else f"{number(self.so_far, SCORE_DIGITS)}, {self.run.status}"
        spread = "" if self.spread is None else f" ± {spread_text(self.spread)}"
        some = "" if self.scores.complete else f" ({len(self.scores.values)} of {self.scores.runs} seeds)"
        return number(self.value, SCORE_DIGITS) + spread + some


@dataclass(frozen=True)
class Ranking:
    """Runs by a metric, in the order of `lightspan.cli.runs.figures`."""

    metric: str
    mode: Mode
    places: list[RankedRun]

    @property
    def first(self) -> str:
        """Which value comes first: "lowest" or "highest"."""
        return "lowest" if self.mode == "min" else "highest"

    def standings(self, places: Sequence[RankedRun]) -> list[int | None]:
        """The number of each of these places, which are in their order; see `lightspan.cli.runs.figures.standings`."""
        return standings([place.scores for place in places], self.mode)


def ranked(runs: Sequence[Run], metric: str | None = None, mode: Mode | None = None) -> Ranking | None:
    """The runs ranked, by default by the first validation loss, or else the first score of validation, that they
    logged; None if they have none, or its name does not tell whether low or high is good.

    Raises: UserError for a `metric` that none of them logged, or whose direction only `mode` can tell.
    """
    logged = list(dict.fromkeys(name for run in runs for name in run.metrics()))
    if metric is not None and metric not in logged:
        raise UserError(f"--metric {metric}: no run logged it; they logged {', '.join(logged)}")
    judged = [name for name in logged if group_of(name) == "val" and better(name) != "neither"]
    judged.sort(key=lambda name: better(name) != "lower")
    chosen = metric or next(iter(judged), None)
    if chosen is None:
        return None
    direction = mode_of(chosen, mode, "--metric")
    places = [_place(run, chosen) for run in runs]
    return Ranking(chosen, direction, sorted(places, key=lambda place: place.scores.place(direction)))


def _place(run: Run, metric: str) -> RankedRun:
    members = run.members or (run,)
    last = [points[-1].value if (points := one.points(metric)) else math.nan for one in members]
    figures: dict[int | None, float | None] = {
        at: figure(one.status, value) for at, (one, value) in enumerate(zip(members, last, strict=True))
    }
    runs = max(len(members), *(one.draws for one in members))
    return RankedRun(run, scores(figures, runs), math.nan if run.members or ended(run.status) else last[0])


def ranking_table(ranking: Ranking) -> str:
    """The ranking as HTML: place, run, value, what differs, steps and time. Run and value come first, so that a narrow
    screen shows them; the rest scrolls.
    """
    settings, left_out = settings_of(ranking)
    heads = ["", "run", ranking.metric, *(setting.name for setting in settings), "steps", "seconds"]
    lines = []
    for at, (place, standing) in enumerate(zip(ranking.places, ranking.standings(ranking.places), strict=True)):
        best = ' class="best"' if standing == 1 else ""
        cells = [
            f'<td>{standing or ""}</td><th scope="row">{escape(place.run.name)}</th>',
            f"<td{best}>{escape(place.text())}</td>",
            *(setting.cell(at) for setting in settings),
            *(f"<td>{escape(_figure(place.run, key))}</td>" for key in ("steps", "seconds")),
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    notes = [f"By the last value of {ranking.metric} of runs that have ended, the {ranking.first} first"]
    if any(place.spread is not None for place in ranking.places):
        notes.append("± is the standard deviation over seeds")
    if left_out:
        differ = "1 more setting differs; it is" if left_out == 1 else f"{left_out} more settings differ; they are"
        notes.append(f"{differ} listed below")
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    return (
        f'<h2>Ranking</h2><div class="scroll"><table class="rank"><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="note">{escape("; ".join(notes))}.</p>'
    )


@dataclass(frozen=True)
class Setting:
    """A setting that differs: its short name, and its value at each place. Classes are named as briefly as tells them
    apart, and `full` has their whole paths.
    """

    name: str
    values: list[str]
    full: list[str]

    def cell(self, at: int) -> str:
        """HTML of the value at one place; the whole path of a class appears when the pointer rests on it."""
        value, full = self.values[at], self.full[at]
        title = "" if value == full else f' title="{escape(full)}"'
        return f'<td class="setting"{title}>{escape(value)}</td>'


def settings_of(ranking: Ranking) -> tuple[list[Setting], int]:
    """The settings that differ, those with the most different values first, and how many there are beyond
    `MOST_SETTINGS`.
    """
    changed = differences([without_seeds(place.run.config) for place in ranking.places])
    changed.sort(key=lambda one: -len(set(one[1])))
    names = short_names([key for key, _ in changed])
    shown = [Setting(names[key], _short_classes(key, values), values) for key, values in changed[:MOST_SETTINGS]]
    return shown, max(0, len(changed) - MOST_SETTINGS)


def _short_classes(key: str, values: list[str]) -> list[str]:
    if not key.endswith("class_path"):
        return values
    short = short_names(set(values))
    return [short[value] for value in values]


def _figure(run: Run, key: str) -> str:
    value = run.summary.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return "—"
    return number(round(float(value)))
