"""A closer look at what is told apart from lightly's: a search of the rate with more seeds."""

import statistics
from collections.abc import Iterable

from evidence.zoo import records
from evidence.zoo.records import OURS, RATES, SEARCH_SEED, SEEDS, THEIRS, Cell, Row
from evidence.zoo.table import PROBES, Spread, Table, listed, markdown, spread_of, verdict

DATA, PAIRS = "fashion", (("SwAV", "ViT"),)
FURTHER = (101, 102, 103)
"""Seeds of the search beside its first."""


def searches() -> list[Cell]:
    """Cells of both packages that search the rates with further seeds."""
    return [
        Cell(by, arm, DATA, encoder, rate, seed)
        for seed in FURTHER
        for arm, encoder in PAIRS
        for by in (OURS, THEIRS)
        for rate in RATES
    ]


def scores(rows: Iterable[Row], by: str, arm: str, encoder: str) -> dict[float, float] | None:
    """The mean score of each rate over all seeds of the search; None while one is missing."""
    found = {records.cell_of(row): records.score(row) for row in records.cells(rows)}
    wanted = {rate: [Cell(by, arm, DATA, encoder, rate, seed) for seed in (SEARCH_SEED, *FURTHER)] for rate in RATES}
    if not found.keys() >= {cell for each in wanted.values() for cell in each}:
        return None
    return {rate: statistics.mean(found[cell] for cell in each) for rate, each in wanted.items()}


def best(found: dict[float, float]) -> float:
    """The rate of the highest score, the smallest of equal ones."""
    return max(RATES, key=found.__getitem__)


def reports(rows: list[Row]) -> list[Cell]:
    """Cells at the rates that all seeds of the search choose; none of a method whose search is not complete."""
    return [
        Cell(by, arm, DATA, encoder, best(found), seed)
        for seed in SEEDS
        for arm, encoder in PAIRS
        for by in (OURS, THEIRS)
        if (found := scores(rows, by, arm, encoder)) is not None
    ]


def spread(rows: list[Row], by: str, arm: str, encoder: str, figure: str) -> Spread | None:
    """Of the reported cells."""
    cells = {cell for cell in reports(rows) if (cell.by, cell.arm, cell.encoder) == (by, arm, encoder)}
    return spread_of([row[figure] for row in records.cells(rows) if records.cell_of(row) in cells and figure in row])


def cause(table: Table, compared: list[list[str]]) -> list[str]:
    """A sentence where a single run had chosen the worst rate, and a better one leaves no difference."""
    found = []
    for arm, encoder, *cells in compared:
        mean = scores(table.rows, OURS, arm, encoder)
        first = records.chosen_rate(table.rows, OURS, arm, DATA, encoder)
        settled = all("higher" not in cell for cell in cells)
        if mean is not None and first is not None and mean[first] == min(mean.values()) and settled:
            found.append(f"{arm} on the {encoder}")
    if not found:
        return []
    return [
        f"So it was the search that set lightspan's {listed(found)} back: one run favoured the rate that is the worst "
        "of the three in the mean.",
        "",
    ]


def section(table: Table) -> list[str]:
    """Of the page; nothing while no search is complete."""
    searched, compared = [], []
    for arm, encoder in PAIRS:
        for by in (OURS, THEIRS):
            if (found := scores(table.rows, by, arm, encoder)) is not None:
                first = records.chosen_rate(table.rows, by, arm, DATA, encoder)
                rates = [f"{found[rate]:.1f}" for rate in RATES]
                searched.append([arm, encoder, by, *rates, f"{first:g}", f"{best(found):g}"])
        cells = [arm, encoder]
        for figure in PROBES:
            ours, theirs = (spread(table.rows, by, arm, encoder, figure) for by in (OURS, THEIRS))
            if ours is not None and theirs is not None:
                told = verdict(ours, theirs, table.noise(DATA, encoder, figure))
                cells += [str(ours), str(theirs), f"{ours.mean - theirs.mean:+.1f}, {told}"]
        compared += [cells] if len(cells) > 2 else []
    if not searched:
        return []
    seeds = 1 + len(FURTHER)
    lines = [
        "## A closer look at the search",
        "",
        f"{listed([f'{arm} on the {encoder}' for arm, encoder in PAIRS])} fell behind lightly's in the table above, "
        f"where a single run of each rate chose. {seeds} seeds for each rate and package give these means of both "
        "probes on the validation pictures:",
        "",
        *markdown(
            ["method", "encoder", "package", *(f"{rate:g}" for rate in RATES), "one seed chose", f"{seeds} choose"],
            searched,
        ),
    ]
    if compared:
        columns = [f"{probe}, {side}" for probe in PROBES.values() for side in (OURS, THEIRS, "difference")]
        lines += [
            f"At the rates that {seeds} seeds choose, on the test pictures and the seeds of the tables above:",
            "",
            *markdown(["method", "encoder", *columns], compared),
            *cause(table, compared),
        ]
    return lines
