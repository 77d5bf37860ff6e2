"""What a sweep prints at its end: its points by their metric, or metrics by their spread over seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from rich.table import Table
from rich.text import Text

from lightspan.cli.runs.figures import SeedScores, standings
from lightspan.cli.runs.numbers import SCORE_DIGITS, number, spread_text
from lightspan.cli.studies.sweeps.files import Sweep
from lightspan.cli.studies.sweeps.points import Settings, written

MOST_ROWS = 10
MOST_SEEDS = 3
"""Seeds that have a column of their own: more do not fit into 80 columns."""
T = TypeVar("T")
SCORES = ("val/", "test/", "probe/")
"""How metrics begin that say how good a model is."""


def ranking_table(sweep: Sweep, ranking: Sequence[tuple[Settings, SeedScores]]) -> Table:
    """The first points of `lightspan.cli.studies.sweeps.ranking.ranked`."""
    order = "lower is better" if sweep.mode == "min" else "higher is better"
    table = Table(title=Text(f"{sweep.metric}, {order}"), title_justify="left")
    for name in ("", *map(sweep.label, sweep.keys), "mean", "spread", "n"):
        table.add_column(Text(name), justify="right")
    numbers = standings([scores for _, scores in ranking], sweep.mode)
    for place, (values, scores) in list(zip(numbers, ranking, strict=True))[:MOST_ROWS]:
        cells = [Text(written(value)) for value in values.values()]
        table.add_row(str(place or ""), *cells, *_figures(scores), style="bold green" if place == 1 else "")
    if len(ranking) > MOST_ROWS:
        table.caption = f"the first {MOST_ROWS} of {len(ranking)} points"
    return table


def seed_table(metrics: Mapping[str, SeedScores]) -> Table:
    """Scores over seeds and, of few seeds, of each; other metrics where there are no scores."""
    seeds = sorted({seed for one in metrics.values() for seed in one.values if seed is not None})
    each = seeds if len(seeds) <= MOST_SEEDS else []
    table = Table()
    table.add_column("metric")
    for name in ("mean", "spread", "n", *(f"seed {seed}" for seed in each)):
        table.add_column(name, justify="right")
    for name, one in scores_of(metrics).items():
        table.add_row(Text(name), *_figures(one), *(_text(one.values.get(seed)) for seed in each))
    return table


def scores_of(metrics: Mapping[str, T]) -> dict[str, T]:
    """Those metrics that say how good a model is; all where none does."""
    return {name: one for name, one in metrics.items() if name.startswith(SCORES)} or dict(metrics)


def _figures(scores: SeedScores) -> list[str]:
    spread = "" if math.isnan(scores.spread) else spread_text(scores.spread)
    n = f"{len(scores.values)}" + ("" if scores.complete else f" of {scores.runs}")
    return [_text(scores.mean if scores.values else None), spread, n]


def _text(value: float | None) -> str:
    return "" if value is None else number(value, SCORE_DIGITS)
