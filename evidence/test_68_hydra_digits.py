"""Hydra (arXiv 2410.18200) on real pictures: trained on the digits 0 to 6, probed on 7 to 9.

The arms of test_68_hydra.py. A linear probe has ten labels of each new digit. The images of 7 to 9 are halved once,
into those that rates are chosen on and those of the claims. The card sets no margin here; the claims ask that Hydra be
no worse than each other arm.

The floor is the untrained network, and the ceiling SupCon at its own rate that also learns from the first half of 7 to
9. Gates: each arm's loss on fixed batches of training images.
"""

import copy
from functools import cache

import numpy as np
import torch
from digits import shuffled
from hydra_arms import ARMS, BATCH, RATES, Data, batches, built, features, train

from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.methods.contrastive.hydra import Hydra
from lightspan.methods.contrastive.supcon import SupCon

SEEDS, SEARCH, STEPS = tuple(range(10, 20)), 100, 600
CEILING = "SupCon, told of 7 to 9"


@cache
def digits() -> tuple[Data, Data, Data]:
    """0 to 6, and both halves of 7 to 9."""
    images, labels = shuffled(0)
    data = Data(torch.from_numpy(images).float()[:, None] * 2 - 1, torch.from_numpy(labels).long())
    new = (data.labels > 6).nonzero()[:, 0]
    rows = (data.labels <= 6).nonzero()[:, 0], new[: len(new) // 2], new[len(new) // 2 :]
    return tuple(Data(data.images[part], data.labels[part]) for part in rows)  # type: ignore[return-value]


@torch.no_grad()
def own_loss(method: Hydra | SupCon, data: Data) -> float:
    """The mean over four fixed batches, with their own statistics."""
    method = copy.deepcopy(method).train()
    drawn = [{"image": data.images[rows], "label": data.labels[rows]} for rows in batches(len(data.labels), 4, seed=1)]
    return sum(float(method.training_step(part, at)) for at, part in enumerate(drawn)) / len(drawn)


def probed(method: Hydra | SupCon, seed: int, half: Data) -> float:
    """Accuracy on 7 to 9 in per cent."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(half.labels)))
    half = Data(half.images[order], half.labels[order])
    of_digit = [(half.labels == digit).nonzero()[:, 0] for digit in (7, 8, 9)]
    sides = (torch.cat([rows[:10] for rows in of_digit]), torch.cat([rows[10:] for rows in of_digit]))
    given = (Data(half.images[rows], half.labels[rows] - 7) for rows in sides)
    return 100 * linear_probe_accuracy(*(x for side in given for x in (features(method, side), side.labels)))


@cache
def trained(name: str, seed: int, rate: float) -> dict[str, float]:
    """Accuracies on 7 to 9 and losses, before and after training."""
    old, first, second = digits()
    told = name == CEILING
    data = Data(*(torch.cat(pair) for pair in zip(old, first, strict=True))) if told else old
    method = built(ARMS["SupCon" if told else name], seed, channels=1, classes=10 if told else 7, rate=rate)
    half = first if seed == SEARCH else second
    method.eval()
    found = {"accuracy before": probed(method, seed, half), "loss before": own_loss(method, data)}
    train(method, data, seed, STEPS)
    return found | {"accuracy": probed(method, seed, half), "loss": own_loss(method, data)}


def test_digits_that_no_arm_was_trained_on(evidence):
    scores = {name: lambda rate, name=name: trained(name, SEARCH, rate)["accuracy"] for name in ARMS}
    rates = evidence.search(scores, RATES[:4], seed=SEARCH)
    runs = {name: {seed: trained(name, seed, rates[name]) for seed in SEEDS} for name in ARMS}
    runs[CEILING] = {seed: trained(CEILING, seed, rates["SupCon"]) for seed in SEEDS}

    def of(name: str, figure: str) -> dict[int, float]:
        return {seed: run[figure] for seed, run in runs[name].items()}

    for name in ARMS:
        evidence.gate(name, of(name, "loss"), of(name, "loss before"), by=0.5, unit="nats", lower_is_better=True)
    accuracy = {name: of(name, "accuracy") for name in runs} | {"untrained": of("Hydra", "accuracy before")}
    for name, of_seed in accuracy.items():
        for seed, value in of_seed.items():
            evidence.figure(f"digits 7 to 9, {name}", value, seed=seed, unit="%")
    evidence.note(f"{STEPS} steps of {BATCH} without views; the probe has 30 labels.")

    def over(first: str, other: str) -> dict[int, float]:
        return {seed: accuracy[first][seed] - accuracy[other][seed] for seed in SEEDS}

    for other in list(ARMS)[1:]:
        evidence.claim(
            f"digits 7 to 9, Hydra minus {other}", over("Hydra", other), at_least=0.0, unit="points",
            floor=over("untrained", other), ceiling=over(CEILING, other), arms=("Hydra", other),
        )  # fmt: skip


if __name__ == "__main__":
    for name in (*ARMS, CEILING):
        for rate in RATES:
            print(name, rate, trained(name, SEARCH, rate), flush=True)
