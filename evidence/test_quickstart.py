"""The quickstart's claim: AdamW's loss with a fraction of its optimiser state, on the Python standard library's source.

Both arms are the recipes of `make quickstart`, whose rates come from one search (benchmarks/quickstart_sweep.py) on
another seed and without the validation files. A seed draws the weights and the order of the data.
"""

import json
import subprocess
import sys
from pathlib import Path

SEEDS = (0, 1, 2)
RECIPES = {"AdamW": "language/quickstart_adamw", "low rank": "language/quickstart"}


def summary(recipe: str, seed: int, run: Path) -> dict[str, float]:
    """Trains a recipe in a process of its own, as a user would, and returns its summary."""
    flags = [f"seed_everything={seed}", f"data.init_args.seed={seed}"]
    command = [sys.executable, "-m", "lightspan", "fit", recipe, "--run", str(run), *flags]
    subprocess.run(command, check=True)
    return json.loads((run / "summary.json").read_text())


def test_low_rank_reaches_adamws_loss_with_less_state(evidence, tmp_path) -> None:
    loss_gap, state_share, slower = {}, {}, {}
    for seed in SEEDS:
        runs = {arm: summary(recipe, seed, tmp_path / f"{arm}-{seed}") for arm, recipe in RECIPES.items()}
        for arm, run in runs.items():
            evidence.figure(f"validation loss, {arm}", run["val_loss_nats"], seed, "nats")
            evidence.figure(f"validation loss, {arm}", run["val_bits_per_byte"], seed, "bits per byte")
            evidence.figure(f"optimiser state, {arm}", run["optimizer_state_mib"], seed, "MiB")
            evidence.figure(f"median step, {arm}", run["step_ms_median"], seed, "ms")
            evidence.figure(f"peak memory, {arm}", run["peak_rss_mib"], seed, "MiB")
        full, low = runs["AdamW"], runs["low rank"]
        loss_gap[seed] = low["val_loss_nats"] - full["val_loss_nats"]
        state_share[seed] = low["optimizer_state_mib"] / full["optimizer_state_mib"]
        slower[seed] = low["step_ms_median"] / full["step_ms_median"]
    evidence.claim("validation loss, low rank minus AdamW", loss_gap, at_most=0.02, unit="nats")
    evidence.claim("optimiser state of the whole model, low rank over AdamW", state_share, at_most=0.4)
    for seed, ratio in slower.items():
        evidence.figure("median step, low rank over AdamW", ratio, seed)
