"""The search behind every rate of the quickstart: the same for both optimisers, blind to the validation files.

    python benchmarks/quickstart_sweep.py [adamw] [lowrank]

Both rates, of the matrices and of everything else, move over a grid of factor two until no neighbour is better: none of
the eight around a point, and none two steps along an axis. A point is judged by its online loss: the mean training loss
of the last fifth of the steps. Every window is seen once, so this is loss on unseen text, and validation files are not
used. The seed is none of those that the evidence uses. Points land in benchmarks/results/quickstart_sweep.json as they
come, and those found there are not run again; delete the file to search afresh. One thread, so that the figures repeat.
"""

import json
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "quickstart_sweep.json"
SEED = 100
RECIPES = {"adamw": "language/quickstart_adamw", "lowrank": "language/quickstart"}
START = {"adamw": (2.0e-3, 6.0e-3), "lowrank": (5.0e-3, 6.0e-3)}  # (matrices, everything else)
RATE_KEYS = ("model.init_args.optimizer.init_args.lr", "model.init_args.groups.other_lr")
NEIGHBOURS = (
    *((0.5, 1), (2, 1), (1, 0.5), (1, 2)),
    *((0.25, 1), (4, 1), (1, 0.25), (1, 4)),  # one run a point is noisy: a step of two gets over a bump of one
    *((0.5, 0.5), (2, 2), (0.5, 2), (2, 0.5)),
)
Point = tuple[float, ...]


def online_loss(name: str, rates: Point) -> float:
    """Trains one point and returns the mean training loss of its last fifth, in nats per byte."""
    from lightning.pytorch import Callback

    from lightspan.config.build import build, resolve, with_layer

    class Losses(Callback):
        values: list[float] = []  # noqa: RUF012 - one run a process

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.values.append(outputs["loss"].item())

    flags = [f"{key}={rate!r}" for key, rate in zip(RATE_KEYS, rates, strict=True)]
    flags += [f"seed_everything={SEED}", f"data.init_args.seed={SEED}", "trainer.limit_val_batches=0"]
    resolved = resolve(RECIPES[name], flags=[*flags, "trainer.enable_checkpointing=false"])
    bare = {kind: dict.fromkeys(resolved.config["trainer"][kind]) for kind in ("callbacks", "logger")}
    built = build(with_layer(resolved, {"trainer": bare}))
    losses = Losses()
    losses.values = []
    built.trainer.callbacks.append(losses)
    built.trainer.fit(built.model, datamodule=built.datamodule)
    tail = losses.values[-(len(losses.values) // 5) :]
    return sum(tail) / len(tail)


def measured(name: str, rates: Point) -> float:
    """The online loss of a point, from the file or by training it."""
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    for row in known:
        if row["optimizer"] == name and (row["lr"], row["other_lr"]) == rates:
            return row["online_loss_nats"]
    start = time.perf_counter()
    loss = online_loss(name, rates)
    row = {"optimizer": name, "lr": rates[0], "other_lr": rates[1], "seed": SEED, "online_loss_nats": round(loss, 4)}
    known = (
        json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    )  # the other optimiser's search may run beside this one
    from lightspan.files import write_atomic

    RESULTS.parent.mkdir(exist_ok=True)
    write_atomic(
        RESULTS,
        json.dumps(sorted([*known, row], key=lambda r: (r["optimizer"], r["lr"], r["other_lr"])), indent=1) + "\n",
    )
    print(
        f"{name:8} lr {rates[0]:.2g} other {rates[1]:.2g}: {loss:.4f} nats, {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return round(loss, 4)


def search(name: str) -> Point:
    """Moves to a better neighbour on the grid until there is none."""
    best, moved = START[name], True
    while moved:
        moved = False
        for factors in NEIGHBOURS:
            candidate = tuple(float(f"{rate * factor:.4g}") for rate, factor in zip(best, factors, strict=True))
            if measured(name, candidate) < measured(name, best):
                best, moved = candidate, True
                break
    return best


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or list(RECIPES):
        rates = search(chosen)
        print(f"{chosen}: lr {rates[0]:.4g}, other_lr {rates[1]:.4g}, {measured(chosen, rates):.4f} nats")
