"""Cells of the comparison by method, with their means over seeds, and the markdown of tables."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from evidence.zoo import records
from evidence.zoo.records import SEEDS, Row

PROBES = {"knn": "kNN", "linear": "linear"}
DATA = {
    "fashion": "Fashion-MNIST, 4,000 pictures",
    "openclipart": "openclipart, drawings of 32 x 32 pixels",
}


class Spread(NamedTuple):
    """Mean and standard deviation over seeds, and how many there are."""

    mean: float
    deviation: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.deviation:.1f}" if self.seeds > 1 else f"{self.mean:.1f}"


def spread_of(found: Sequence[float]) -> Spread | None:
    """None of no values."""
    if not found:
        return None
    return Spread(statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found))


def noise_of(spreads: Sequence[Spread | None]) -> float | None:
    """The least difference of two means over all seeds that is told from none: twice its standard deviation, from the
    deviation over seeds pooled over all methods."""
    squares = [(found.deviation**2, found.seeds - 1) for found in spreads if found and found.seeds > 1]
    freedom = sum(weight for _, weight in squares)
    if not freedom:
        return None
    return 2 * math.sqrt(2 / len(SEEDS) * sum(square * weight for square, weight in squares) / freedom)


class Key(NamedTuple):
    by: str
    arm: str
    data: str
    encoder: str


class Table:
    """The reported cells of a file of records, by method: of each one those at the rate that its search chose."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.of: dict[Key, list[Row]] = {}
        reported = {cell for data in DATA for cell in records.reports(self.rows, data)}
        for row in records.cells(rows):
            if records.cell_of(row) in reported:
                self.of.setdefault(Key(*(row[name] for name in Key._fields)), []).append(row)

    def values(self, key: Key, figure: str) -> list[float]:
        return [row[figure] for row in self.of.get(key, []) if row.get(figure) is not None]

    def spread(self, key: Key, figure: str) -> Spread | None:
        return spread_of(self.values(key, figure))

    def step_ms(self, key: Key) -> float | None:
        found = self.values(key, "step_ms")
        return statistics.median(found) if found else None

    def noise(self, data: str, encoder: str, figure: str) -> float | None:
        return noise_of([self.spread(key, figure) for key in self.of if (key.data, key.encoder) == (data, encoder)])

    def data(self) -> list[str]:
        return [name for name in DATA if any(key.data == name for key in self.of)]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return [head, "|" + "---|" * len(columns), *body, ""]


def shown(value: Any, form: str = "") -> str:
    return "" if value is None else format(value, form) if form else str(value)


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def verdict(ours: Spread, theirs: Spread, noise: float | None) -> str:
    """Whether two means are told apart; seeds that are not measured yet leave it open."""
    difference = ours.mean - theirs.mean
    if noise is None or min(ours.seeds, theirs.seeds) < len(SEEDS):
        return "seeds are missing"
    return "within noise" if abs(difference) <= noise else "lightspan higher" if difference > 0 else "lightly higher"
