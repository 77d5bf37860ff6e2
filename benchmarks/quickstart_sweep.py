"""The search behind every rate of the quickstart: the same for all optimisers, blind to the validation files.

    python benchmarks/quickstart_sweep.py [adamw] [lowrank] [factored_muon]

Both rates, of the matrices and of everything else, move over a grid of factor two until no neighbour is better: none of
the eight around a point, and none two steps along an axis. A point is one run of the recipe, in build/quickstart_sweep,
and is judged by its online loss: the mean training loss of the last fifth of the steps. Every window is seen once, so
this is loss on unseen text, and validation files are not used. The seed is none of those that the evidence uses. Points
land in benchmarks/results/quickstart_sweep.json as they come, and those found there are not run again; delete the file
to search afresh. One thread, so that the figures repeat.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from descent import descend

from lightspan.cli.runs.fits import Task, exits_on_sigterm, fit_command, last_lines
from lightspan.cli.studies.queue import run_queue
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.runs import METRICS, OUTPUT

RESULTS = Path(__file__).parent / "results" / "quickstart_sweep.json"
RUNS = Path(__file__).parents[1] / "build" / "quickstart_sweep"
SEED = 100
RECIPES = {
    "adamw": "language/quickstart_adamw",
    "lowrank": "language/quickstart_lowrank",
    "factored_muon": "language/quickstart",
}
# (matrices, everything else). FactoredMuon starts where benchmarks/quality.py ended on the same text, with fewer points
# on the way.
START = {"adamw": (2.0e-3, 6.0e-3), "lowrank": (5.0e-3, 6.0e-3), "factored_muon": (1.6e-2, 4.8e-2)}
RATE_KEYS = ("model.init_args.optimizer.init_args.lr", "model.init_args.groups.other_lr")
NEIGHBOURS = (
    *((0.5, 1), (2, 1), (1, 0.5), (1, 2)),
    *((0.25, 1), (4, 1), (1, 0.25), (1, 4)),  # one run a point is noisy: a step of two gets over a bump of one
    *((0.5, 0.5), (2, 2), (0.5, 2), (2, 0.5)),
)
Rates = tuple[float, ...]


def online_loss(name: str, rates: Rates, runs: Path = RUNS) -> float:
    """Trains one point and returns the mean training loss of its last fifth, in nats per byte."""
    run = runs / f"{name}-lr{rates[0]:g}-other{rates[1]:g}"
    words = [f"{key}={rate!r}" for key, rate in zip(RATE_KEYS, rates, strict=True)]
    words += [f"seed_everything={SEED}", f"data.init_args.seed={SEED}", "trainer.limit_val_batches=0"]
    words += ["trainer.log_every_n_steps=1"]
    task = Task(run.name, fit_command([RECIPES[name], *words], run), run / OUTPUT)
    if status := run_queue(iter([task]), workers=1, total=1)[task.name]:
        raise UserError(f"{run} ended with status {status}:\n{last_lines(task.log)}")
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    losses = [row["train/loss_nats"] for row in rows if "train/loss_nats" in row]
    tail = losses[-(len(losses) // 5) :]
    return sum(tail) / len(tail)


def known() -> list[dict[str, Any]]:
    """The points measured so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []


def measured(name: str, rates: Rates) -> float:
    """The online loss of a point, from the file or by training it."""
    for row in known():
        if row["optimizer"] == name and (row["lr"], row["other_lr"]) == rates:
            return row["online_loss_nats"]
    loss = round(online_loss(name, rates), 4)
    row = {"optimizer": name, "lr": rates[0], "other_lr": rates[1], "seed": SEED, "online_loss_nats": loss}
    rows = [*known(), row]  # read again: another optimiser's search may run beside this one
    RESULTS.parent.mkdir(exist_ok=True)
    rows.sort(key=lambda row: (row["optimizer"], row["lr"], row["other_lr"]))
    write_atomic(RESULTS, json.dumps(rows, indent=1) + "\n")
    print(f"{name:8} lr {rates[0]:.2g} other {rates[1]:.2g}: {loss:.4f} nats", flush=True)
    return loss


def search(name: str) -> Rates:
    """Moves to a better neighbour on the grid until there is none."""
    return descend(lambda rates: measured(name, rates), START[name], NEIGHBOURS)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    with exits_on_sigterm():
        for chosen in sys.argv[1:] or list(RECIPES):
            rates = search(chosen)
            print(f"{chosen}: lr {rates[0]:.4g}, other_lr {rates[1]:.4g}, {measured(chosen, rates):.4f} nats")
