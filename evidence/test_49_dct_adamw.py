"""DCT-AdamW (arXiv 2505.17967): columns chosen in every step against a fixed choice and against the SVD.

All arms train the model of recipes/language/dct_adamw.yaml at the same rank with the same data, groups and schedule:

- DCT: the recipe: DCT columns chosen in every step, moments that follow them, error feedback.
- fixed: equally many columns of the same basis, drawn once per matrix. (Error feedback would change nothing: what lies
  outside a fixed frame never comes back into it.)
- SVD: GaLore with a new SVD in every step, moments left as they are, as published.
- slots: the recipe with moments that stay in their slots while the columns behind them change.

The same search gives each arm its rate: on seed 100, by the mean training loss of the last fifth of the steps (every
window is seen once, so this is loss on unseen text; validation files are not used), by factors of two until both
neighbours are worse. `python evidence/test_49_dct_adamw.py` repeats it and prints the table below.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning import Callback, seed_everything
from torch import Tensor

from lightspan.cli.config.build import build, resolve, with_layer
from lightspan.optim.low_rank.bases import DCTBasis
from lightspan.optim.low_rank.carries import Gather, Keep
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.presets import DCTAdamW, GaLore
from lightspan.optim.matrices.stacks import Layout, State

RECIPE, RANK, WIDTH = "language/dct_adamw", 16, 64
SEEDS = (0, 1, 2)
SHARED = {"rank": RANK, "betas": (0.9, 0.95), "weight_decay": 0.1}
RATES = {"DCT": 3.2e-2, "fixed": 8e-3, "SVD": 1.6e-2, "slots": 3.2e-2}


class MeasuredDCT(DCTBasis):
    """Keeps the share of energy that each choice of columns captures, mean over the matrices of a call."""

    def __init__(self) -> None:
        super().__init__(carry=Gather(own_age=False))
        self.captured: list[float] = []

    def refresh(self, gradients: Sequence[Tensor], state: State, layout: Layout, *, first: bool) -> State:
        chosen = super().refresh(gradients, state, layout, first=first)
        energy_BN = self.energies(gradients, layout)
        self.captured.append(float((energy_BN.gather(1, chosen["columns"]).sum(1) / energy_BN.sum(1)).mean()))
        return chosen


class FixedColumns(DCTBasis):
    """Columns drawn once, whatever the gradient."""

    def refresh(self, gradients: Sequence[Tensor], state: State, layout: Layout, *, first: bool) -> State:
        draws = [
            torch.randperm(layout.size, generator=torch.Generator().manual_seed(seed))[: layout.rank].sort().values
            for seed in layout.seeds
        ]
        return {"columns": torch.stack(draws)} if first else state


def optimizer(arm: str, lr: float, seed: int, basis: MeasuredDCT) -> partial[LowRank]:
    """The arm's optimiser, waiting for parameters."""
    shared = {**SHARED, "lr": lr, "seed": seed}
    if arm == "fixed":
        return partial(LowRank, basis=FixedColumns(carry=Keep()), residual=None, refresh=1, **shared)
    if arm == "SVD":
        return partial(GaLore, refresh=1, scale=1.0, **shared)
    made = partial(DCTAdamW, error_feedback="float32", rotate=arm == "DCT", **shared)
    return partial(_measured, made, basis) if arm == "DCT" else made


def _measured(make: partial[LowRank], basis: MeasuredDCT, params: Iterable[Any]) -> LowRank:
    low_rank = make(params)
    low_rank.rule = replace(low_rank.rule, basis=basis)
    return low_rank


class Losses(Callback):
    """Training loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(outputs["loss"].item())


def train(arm: str, lr: float, seed: int, validate: bool = True) -> tuple[float, float, float]:
    """One run. Returns validation loss, online loss of the last fifth, and mean captured energy of the DCT arm."""
    flags = [f"seed_everything={seed}", f"data.init_args.seed={seed}", "trainer.enable_checkpointing=false"]
    flags += ["trainer.limit_val_batches=0"] if not validate else ["trainer.val_check_interval=1500"]
    resolved = resolve(RECIPE, flags=flags)
    bare = {kind: dict.fromkeys(resolved.config["trainer"][kind]) for kind in ("callbacks", "logger")}
    seed_everything(seed, verbose=False)
    built = build(with_layer(resolved, {"trainer": bare}))
    basis, losses = MeasuredDCT(), Losses()
    built.model.optimizer = optimizer(arm, lr, seed, basis)
    built.trainer.callbacks.append(losses)
    built.trainer.fit(built.model, datamodule=built.datamodule)
    tail = losses.values[-(len(losses.values) // 5) :]
    captured = sum(basis.captured) / max(len(basis.captured), 1)
    validation = float(built.trainer.callback_metrics["val/loss_nats"]) if validate else float("nan")
    return validation, sum(tail) / len(tail), captured


def test_chosen_columns_beat_fixed_ones_and_come_near_the_svd(evidence) -> None:
    over_fixed, to_svd, slots_cost, captured = {}, {}, {}, {}
    for seed in SEEDS:
        loss = {}
        for arm, rate in RATES.items():
            loss[arm], _, share = train(arm, rate, seed)
            evidence.figure(f"validation loss, {arm}", loss[arm], seed, "nats")
            if arm == "DCT":
                captured[seed] = share / (RANK / WIDTH)
        over_fixed[seed] = loss["fixed"] - loss["DCT"]
        to_svd[seed] = loss["DCT"] - loss["SVD"]
        slots_cost[seed] = loss["slots"] - loss["DCT"]
    evidence.note("Rates by one search for all arms on seed 100: " + ", ".join(f"{a} {r:g}" for a, r in RATES.items()))
    evidence.claim("validation loss, fixed minus DCT", over_fixed, at_least=0.05, unit="nats")
    evidence.claim("validation loss, DCT minus SVD", to_svd, at_most=0.03, unit="nats")
    evidence.claim("captured energy over r/n", captured, at_least=1.15)
    evidence.claim("validation loss, slots minus DCT", slots_cost, at_least=0.0, unit="nats")


if __name__ == "__main__":
    for name in sys.argv[1:] or RATES:
        known: dict[float, float] = {}

        def online(rate: float, arm: str = name, known: dict[float, float] = known) -> float:
            if rate not in known:
                known[rate] = train(arm, rate, 100, validate=False)[1]
                print(f"{arm} lr {rate:g}: {known[rate]:.4f} nats", flush=True)
            return known[rate]

        best = RATES[name]
        while (better := min((best / 2, best, best * 2), key=online)) != best:
            best = better
        print(f"{name}: {best:g}", flush=True)
