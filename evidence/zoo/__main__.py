"""Measures the comparison of representation learning, or builds its page from what was measured.

    python -m evidence.zoo run [--data fashion openclipart full] [--records FILE] [--steps N]
    python -m evidence.zoo page [--records FILE]

Every finished run is kept in evidence/results/zoo.jsonl and never run again; stop and resume at any time. One thread
does everything, so that times can be compared. After a change of the settings remove the lines that it concerns.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from evidence.surroundings import surroundings
from evidence.zoo import closer, lightly_views, longer, page, pictures, records, training
from evidence.zoo.methods import ENCODERS, ENTRIES
from evidence.zoo.records import OURS, SEEDS, UNTRAINED, Cell, Row
from lightspan.core.errors import UserError

STEPS = {"fashion": 200, "openclipart": 200, longer.DATA: longer.STEPS}
TIMED = 30
KINDS = ("", "two", "one", "nested", "crops")  # of views; the untrained encoder needs none


def kind_of(cell: Cell) -> str:
    return "" if cell.arm == UNTRAINED else ENTRIES[cell.arm].views


def measured(cell: Cell, made: list[pictures.Batch]) -> Row:
    """The scores of one cell, or why it has none."""
    split = pictures.load(cell.data)
    task = training.task_of(split, cell.encoder)
    part = "test" if cell.seed in SEEDS else "val"
    watched = cell.data == longer.DATA and cell.seed in SEEDS
    watching = training.Watching(split, part, longer.looks(len(made))) if watched else None
    try:
        if cell.arm == UNTRAINED:
            trained = training.untrained(task, cell.seed)
        else:
            run = training.train if cell.by == OURS else training.train_peer
            trained = run(cell.arm, task, cell.rate, cell.seed, made, watching)
        found: Row = {**training.scores(trained.features, split, part)}
        if trained.student is not None:
            of_student = training.scores(trained.student, split, part)
            found |= {f"student_{name}": value for name, value in of_student.items()}
    except UserError as error:  # features that are not finite
        return {"error": str(error)}
    step_ms = trained.step_ms and round(trained.step_ms, 2)
    curve = {"curve": watching.curve} if watching and watching.curve else {}
    return {name: round(value, 3) for name, value in found.items()} | {"step_ms": step_ms} | curve


def run_cells(cells: Iterable[Cell], steps: int) -> Iterator[tuple[Cell, Row]]:
    """Those of the same data, seed and kind of views one after the other, which share their batches."""
    common = sorted(cells, key=lambda cell: (cell.seed, kind_of(cell)))
    for (seed, kind), group in groupby(common, key=lambda cell: (cell.seed, kind_of(cell))):
        first, *rest = group
        split = pictures.load(first.data)
        made = pictures.batches(split, kind, seed, steps, training.BATCH) if kind else []
        for cell in (first, *rest):
            yield cell, measured(cell, made)


def speeds(steps: int = TIMED) -> Iterator[Row]:
    """Steps of lightspan and of lightly in turns, on the data where both are compared."""
    split = pictures.load("fashion")
    for encoder in ENCODERS:
        for arm in records.PEER_ARMS:
            if encoder in ENTRIES[arm].encoders:
                made = pictures.batches(split, ENTRIES[arm].views, 0, steps, training.BATCH)
                ours, theirs = training.interleaved(arm, training.task_of(split, encoder), made)
                yield {"kind": "speed", "arm": arm, "encoder": encoder, "ours_ms": ours, "theirs_ms": theirs}


def plans(rows: list[Row], data: str) -> Iterator[list[Cell]]:
    """What is to be run, in this order. Each list follows from the rows that there are when it is asked for."""
    if data == longer.DATA:
        for _ in longer.GRID:
            yield longer.searches(rows)
        yield longer.reports(rows)
        return
    yield records.searches(data)
    yield records.reports(rows, data)
    if data == closer.DATA:
        yield closer.searches()
        yield closer.reports(rows)


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = records.read(options.records)
    around = surroundings()
    about = {name: around[name] for name in ("commit", "uncommitted_changes", "date", "cpu")}
    about["torch"] = torch.__version__

    def keep(row: Row) -> None:
        rows.append(row | about)
        records.write(options.records, rows)

    if not any(row["kind"] == "speed" for row in rows):
        for row in speeds(options.steps or TIMED):
            keep(row)
        for row in lightly_views.measure(pictures.load("fashion")):
            keep(row)
    for data in options.data:
        steps = options.steps or STEPS[data]
        # Kind by kind, so that a run that is stopped leaves whole rows of the table.
        for kind, plan in ((kind, plan) for kind in KINDS for plan in plans(rows, data)):
            finished = records.done(rows)
            wanted = [cell for cell in plan if kind_of(cell) == kind and cell not in finished]
            start_s = time.perf_counter()
            for number, (cell, found) in enumerate(run_cells(wanted, steps), start=1):
                keep({"kind": "cell", **cell._asdict(), "steps": steps, "batch": training.BATCH, **found})
                minutes = (time.perf_counter() - start_s) / 60
                print(f"{number}/{len(wanted)} after {minutes:.1f} min: {' '.join(map(str, cell))} {found}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evidence.zoo", description=(__doc__ or "").split("\n")[0])
    verbs: Any = parser.add_subparsers(required=True)
    for name, call in (("run", run), ("page", lambda options: page.build(options.records))):
        verb = verbs.add_parser(name)
        verb.set_defaults(call=call)
        verb.add_argument("--records", type=Path, default=records.RESULTS)
        if name == "run":
            verb.add_argument("--data", nargs="+", choices=list(STEPS), default=["fashion", "openclipart"])
            verb.add_argument("--steps", type=int, help="of each run; less than the default only tells that it runs")
    options = parser.parse_args(arguments)
    options.call(options)


if __name__ == "__main__":
    sys.exit(main())
