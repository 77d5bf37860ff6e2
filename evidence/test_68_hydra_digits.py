"""Hydra (arXiv 2410.18200) on real pictures: trained on the digits 0 to 6, probed on 7 to 9.

The arms of test_68_hydra.py. A linear probe has ten labels of each new digit. The images of 7 to 9 are halved once,
into those that rates are chosen on (`python evidence/test_68_hydra_digits.py`, seed 100) and those of the claims. The
card sets no margin here; the claims ask that Hydra be no worse than each other arm.
"""

import numpy as np
import torch
from digits import shuffled
from hydra_arms import ARMS, BATCH, RATES, SEEDS, Arm, Data, built, features, train

from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy

STEPS = 600
CHOSEN = {"Hydra": 3e-3, "no gate": 3e-2, "identical pairs": 3e-2, "SupCon": 1e-2}


def on_digits(arm: Arm, seed: int, rate: float, steps: int = STEPS, validation: bool = False) -> float:
    """Accuracy on 7 to 9 in per cent, after training on 0 to 6; with steps=0 of the untrained network."""
    images, labels = shuffled(0)
    data = Data(torch.from_numpy(images).float()[:, None] * 2 - 1, torch.from_numpy(labels).long())
    known, new = data.labels <= 6, (data.labels > 6).nonzero()[:, 0]
    method = built(arm, seed, channels=1, classes=7, rate=rate)
    if steps:
        train(method, Data(data.images[known], data.labels[known]), seed, steps)
    method.eval()
    half = new[: len(new) // 2] if validation else new[len(new) // 2 :]
    half = half[torch.from_numpy(np.random.default_rng(seed).permutation(len(half)))]
    of_half = data.labels[half]
    bank = torch.cat([half[of_half == digit][:10] for digit in (7, 8, 9)])
    rest = torch.cat([half[of_half == digit][10:] for digit in (7, 8, 9)])
    sides = (Data(data.images[rows], data.labels[rows]) for rows in (bank, rest))
    return 100 * linear_probe_accuracy(*(x for side in sides for x in (features(method, side), side.labels - 7)))


def test_digits_that_no_arm_was_trained_on(evidence):
    runs = {name: {seed: on_digits(arm, seed, CHOSEN[name]) for seed in SEEDS} for name, arm in ARMS.items()}
    runs["untrained"] = {seed: on_digits(ARMS["SupCon"], seed, 1.0, steps=0) for seed in SEEDS}
    for name, of_seed in runs.items():
        for seed, accuracy in of_seed.items():
            evidence.figure(f"digits 7 to 9, {name}", accuracy, seed=seed, unit="%")
    evidence.note(
        f"{STEPS} steps of {BATCH} without views; the probe has 30 labels. Rates chosen of {RATES} on seed 100: "
        f"{', '.join(f'{name} {rate:g}' for name, rate in CHOSEN.items())}."
    )
    for other in ("SupCon", "identical pairs", "no gate", "untrained"):
        gain = {seed: runs["Hydra"][seed] - runs[other][seed] for seed in SEEDS}
        evidence.claim(f"digits 7 to 9, Hydra minus {other}", gain, at_least=0.0, unit="points")


if __name__ == "__main__":
    for name, arm in ARMS.items():
        for rate in RATES:
            print(name, rate, on_digits(arm, 100, rate, validation=True), flush=True)
