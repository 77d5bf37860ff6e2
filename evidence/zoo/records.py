"""The records of the comparison: one line of JSON for each thing measured, and what is still to be measured.

A cell is a run of one method by one package on one encoder, one data set, one rate and one seed. Cells of the seed
`SEARCH_SEED` are scored on validation pictures and choose the rate; those of `SEEDS` are scored on test pictures and
are what the page reports; those of the seeds of `closer` are scored on validation pictures too. `longer` plans the
cells of all of Fashion-MNIST. A cell that stands in
the file is never run again.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from evidence.zoo.methods import ENCODERS, ENTRIES, Entry
from lightspan.core.files.atomic import write_atomic

RESULTS = Path(__file__).parents[1] / "results" / "zoo.jsonl"
SEARCH_SEED, SEEDS = 100, (0, 1, 2)
RATES = (1e-3, 3e-3, 1e-2)
OURS, THEIRS, UNTRAINED = "lightspan", "lightly", "untrained"
PEER_ARMS = ("SimCLR", "Barlow Twins", "DINO", "SwAV", "MAE")
SEARCHED_ON = {"fashion": "fashion", "openclipart": "fashion"}
"""Data -> the data whose validation pictures chose its rates."""
WITH_PEERS = ("fashion",)
Row = dict[str, Any]


class Cell(NamedTuple):
    by: str
    arm: str
    data: str
    encoder: str
    rate: float
    seed: int


def cell_of(row: Row) -> Cell:
    return Cell(*(row[name] for name in Cell._fields))


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def write(path: Path, rows: Iterable[Row]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def cells(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "cell"]


def score(row: Row) -> float:
    """What chooses a rate: the mean of both probes; a run that diverged has the least."""
    return (row["knn"] + row["linear"]) / 2 if row.get("error") is None else float("-inf")


def chosen_rate(rows: Iterable[Row], by: str, arm: str, data: str, encoder: str) -> float | None:
    """The rate that the search found best, the smallest of equal ones; None while it is not complete."""
    searched = Cell(by, arm, SEARCHED_ON[data], encoder, 0.0, SEARCH_SEED)
    found = {row["rate"]: row for row in cells(rows) if cell_of(row)._replace(rate=0.0) == searched}
    return max(RATES, key=lambda rate: score(found[rate])) if found.keys() >= set(RATES) else None


def arms(data: str) -> Iterator[tuple[str, str, Entry]]:
    """(package, method, entry) of each method that trains on the data."""
    yield from ((OURS, arm, entry) for arm, entry in ENTRIES.items())
    if data in WITH_PEERS:
        yield from ((THEIRS, arm, ENTRIES[arm]) for arm in PEER_ARMS)


def searches(data: str) -> list[Cell]:
    """Cells that choose rates."""
    on = SEARCHED_ON[data]
    return [
        Cell(by, arm, on, encoder, rate, SEARCH_SEED)
        for by, arm, entry in arms(on)
        for encoder in entry.encoders
        for rate in RATES
    ]


def reports(rows: list[Row], data: str) -> list[Cell]:
    """Cells that the page reports, seed by seed; the rate is NaN of those whose search is not complete."""
    plan = [Cell(OURS, UNTRAINED, data, encoder, 0.0, -1) for encoder in ENCODERS]
    for by, arm, entry in arms(data):
        for encoder in entry.encoders:
            rate = chosen_rate(rows, by, arm, data, encoder)
            plan.append(Cell(by, arm, data, encoder, float("nan") if rate is None else rate, -1))
    return [cell._replace(seed=seed) for seed in SEEDS for cell in plan]


def done(rows: Iterable[Row]) -> set[Cell]:
    return {cell_of(row) for row in cells(rows)}
