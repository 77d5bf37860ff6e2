"""The quickstart's claim: a loss below AdamW's with less optimiser state, in a subspace and with FactoredMuon.

A byte-level Llama reads the source of Python's standard library. The arms are the recipes of `make quickstart`, whose
rates come from one search (benchmarks/quickstart_sweep.py) on another seed and without the validation files. A seed
draws the weights and the order of the data.
"""

import json
import subprocess
import sys
from pathlib import Path

SEEDS = (0, 1, 2)
RECIPES = {
    "AdamW": "language/quickstart_adamw",
    "low rank": "language/quickstart_lowrank",
    "FactoredMuon": "language/quickstart",
}


def summary(recipe: str, seed: int, run: Path) -> dict[str, float]:
    """Trains a recipe in a process of its own, as a user would, and returns its summary."""
    flags = [f"seed_everything={seed}", f"data.init_args.seed={seed}"]
    command = [sys.executable, "-m", "lightspan", "fit", recipe, "--run", str(run), *flags]
    subprocess.run(command, check=True)
    return json.loads((run / "summary.json").read_text())


def test_low_rank_and_factored_muon_reach_adamws_loss_with_less_state(evidence, tmp_path) -> None:
    found: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in RECIPES}
    for seed in SEEDS:
        for arm, recipe in RECIPES.items():
            run = found[arm][seed] = summary(recipe, seed, tmp_path / f"{arm}-{seed}")
            evidence.figure(f"validation loss, {arm}", run["val_loss_nats"], seed, "nats")
            evidence.figure(f"validation loss, {arm}", run["val_bits_per_byte"], seed, "bits per byte")
            evidence.figure(f"optimiser state, {arm}", run["optimizer_state_mib"], seed, "MiB")
            evidence.figure(f"median step, {arm}", run["step_ms_median"], seed, "ms")
            evidence.figure(f"peak memory, {arm}", run["peak_rss_mib"], seed, "MiB")

    def minus(arm: str, peer: str) -> dict[int, float]:
        return {seed: found[arm][seed]["val_loss_nats"] - found[peer][seed]["val_loss_nats"] for seed in SEEDS}

    def over_adamw(arm: str, figure: str) -> dict[int, float]:
        return {seed: found[arm][seed][figure] / found["AdamW"][seed][figure] for seed in SEEDS}

    evidence.claim("validation loss, low rank minus AdamW", minus("low rank", "AdamW"), at_most=0.02, unit="nats")
    state = "optimiser state of the whole model"
    evidence.claim(f"{state}, low rank over AdamW", over_adamw("low rank", "optimizer_state_mib"), at_most=0.4)
    below = minus("FactoredMuon", "low rank")
    evidence.claim("validation loss, FactoredMuon minus low rank", below, at_most=-0.02, unit="nats")
    evidence.claim(f"{state}, FactoredMuon over AdamW", over_adamw("FactoredMuon", "optimizer_state_mib"), at_most=0.15)
    for arm in ("low rank", "FactoredMuon"):
        for seed, ratio in over_adamw(arm, "step_ms_median").items():
            evidence.figure(f"median step, {arm} over AdamW", ratio, seed)
