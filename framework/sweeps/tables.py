"""What a sweep prints at its end: its points by their metric, or metrics by their spread over seeds."""

import math
from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from lightspan.runs.figures import SeedScores
from lightspan.runs.numbers import SCORE_DIGITS, number, spread_text
from lightspan.sweeps.files import Sweep
from lightspan.sweeps.points import Settings, written

MOST_ROWS = 10
SCORES = ("val/", "test/", "probe/")
"""How metrics begin that say how good a model is."""


def ranking_table(sweep: Sweep, ranking: Sequence[tuple[Settings, SeedScores]]) -> Table:
    """The first points of `lightspan.sweeps.ranking.ranked`."""
    order = "lower is better" if sweep.mode == "min" else "higher is better"
    table = Table(title=Text(f"{sweep.metric}, {order}"), title_justify="left")
    for name in ("", *map(sweep.label, sweep.keys), "mean", "spread", "n"):
        table.add_column(Text(name), justify="right")
    for place, (values, scores) in enumerate(ranking[:MOST_ROWS], 1):
        cells = [Text(written(value)) for value in values.values()]
        style = "bold green" if place == 1 and scores.values else ""
        table.add_row(str(place), *cells, *_figures(scores), style=style)
    if len(ranking) > MOST_ROWS:
        table.caption = f"the first {MOST_ROWS} of {len(ranking)} points"
    return table


def seed_table(metrics: Mapping[str, SeedScores]) -> Table:
    """Scores over seeds; other metrics where there are no scores."""
    table = Table()
    for name in ("metric", "mean", "spread", "n"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    scores = {name: one for name, one in metrics.items() if name.startswith(SCORES)} or metrics
    for name, one in scores.items():
        table.add_row(Text(name), *_figures(one))
    return table


def _figures(scores: SeedScores) -> list[str]:
    spread = "" if math.isnan(scores.spread) else spread_text(scores.spread)
    n = f"{len(scores.values)}" + ("" if scores.complete else f" of {scores.runs}")
    return [number(scores.mean, SCORE_DIGITS) if scores.values else "", spread, n]
