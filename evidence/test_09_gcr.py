"""Classes as subspaces (arXiv 2308.01547): transfer of features that a Grassmann head trained, against a vector head.

An MLP of 64-128-64 learns digits 0 to 4; then a linear probe on its frozen features tells 5 to 9 apart. Arms differ in
the head and its optimiser alone: a linear layer, Grassmann heads of several dimensions, and one whose frames take plain
SGD steps that QR brings back. Rates, of network and head, are searched by accuracy on held-out images of digits 0 to 4,
never by transfer, on 597 images that three seeds divide anew; figures are taken on the other 1,200. Heads of one and of
eight dimensions, which are compared by how far features lie from the mean of their class, have the rate of four.

Floors: the untrained network. Ceilings: a network with a linear layer that learned the probe's own images; no mistake;
and, of the angle, directions of eight coordinates drawn from a half normal law, all of whose logits are full.

Measured: of the source, k=4 loses nothing to the linear layer, and Riemannian steps end where plain SGD and QR do. The
probe is 2.1 points ahead with k=4, but an untrained network is read as well: a linear layer loses what digits show
without training, and k=4 keeps it. That k=4 teaches more for other classes could not be told. Nor could the angle: in
an untrained network features are as far from the mean of their class, and from k=1 to k=8 the angle hardly grows.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from digits import parted
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.nn.heads.grassmann_head import GrassmannHead
from lightspan.optim.groups import ParameterGroups
from lightspan.optim.riemannian import RiemannianSGD
from lightspan.subspaces.grassmann import orthonormalised

SEEDS, SEARCHED = tuple(range(15)), (100, 101, 102)
SOURCE, EPOCHS, BATCH, WIDTH = 5, 40, 32, 64
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
ARMS = ("vector", "k=4", "k=4, SGD and QR")
DIMENSIONS = {"vector": 0, "k=1": 1, "k=4": 4, "k=8": 8, "k=4, SGD and QR": 4}
Split = dict[str, tuple[Tensor, Tensor]]


class PlainSGD(torch.optim.SGD):
    """SGD with momentum in the ambient space; frames are brought back by QR after each step."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for frame in group["params"] if group.get("frames") else ():
                    frame.copy_(orthonormalised(frame))


def split(seed: int) -> Split:
    """Two thirds of digits 0 to 4 to train on, a third to hold out, and 5 to 9 likewise for the probe and its test."""
    images, labels = parted(seed, seed in SEARCHED)
    x, y = torch.from_numpy(images).flatten(1).float(), torch.from_numpy(labels).long()
    first = torch.arange(len(y)) < len(y) * 2 // 3
    parts = {"train": first & (y < SOURCE), "held": ~first & (y < SOURCE)}
    parts |= {"probe": first & (y >= SOURCE), "test": ~first & (y >= SOURCE)}
    return {name: (x[rows], y[rows] % SOURCE) for name, rows in parts.items()}


def built(arm: str, seed: int, rate: float) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, WIDTH), nn.ReLU())
    k = DIMENSIONS[arm]
    head: nn.Module = GrassmannHead(WIDTH, SOURCE, k, seed=seed) if k else nn.Linear(WIDTH, SOURCE)
    sgd = partial(torch.optim.SGD, lr=rate, momentum=0.9, weight_decay=1e-4)
    make: Any = sgd
    if "SGD" in arm:
        make = partial(PlainSGD, lr=rate, momentum=0.9, weight_decay=1e-4)
    elif k:
        make = partial(RiemannianSGD, lr=rate, rest=sgd)
    return network, head, ParameterGroups().optimizer(nn.Sequential(network, head), make)


def run(arm: str, seed: int, rate: float, epochs: int = EPOCHS, learns: str = "train") -> dict[str, float]:
    """Per cent on held-out digits 0 to 4 and of the probe on 5 to 9; mean angle to the class mean in degrees.

    Args:
        epochs: with 0 untrained.
        learns: "train", or "probe" for the digits 5 to 9 that the probe learns.
    """
    data = split(seed)
    network, head, optimizer = built(arm, seed, rate)
    x, y = data[learns]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1))
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(head(network(x[rows])), y[rows]).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        features = {name: (network(images), label) for name, (images, label) in data.items()}
        held, truth = features["held"]
        source = 100 * (head(held).argmax(dim=1) == truth).float().mean().item()
        probe = 100 * linear_probe_accuracy(*features["probe"], *features["test"])
        return {"source": source, "probe": probe, "angle": angle(held, truth)}


def angle(x: Tensor, label: Tensor) -> float:
    unit = F.normalize(x, dim=1)
    means = F.normalize(torch.stack([unit[label == c].mean(dim=0) for c in range(SOURCE)]), dim=1)
    return float(torch.rad2deg((unit * means[label]).sum(dim=1).clamp(-1, 1).acos()).mean())


def widest(seed: int, count: int = 200) -> float:
    """The angle of directions that fill the positive part of eight dimensions."""
    rows = torch.randn(count * SOURCE, 8, generator=torch.Generator().manual_seed(seed)).abs()
    return angle(rows, torch.arange(SOURCE).repeat_interleave(count))


def searched(arm: str, rate: float) -> float:
    return float(np.mean([run(arm, seed, rate)["source"] for seed in SEARCHED]))


def test_subspaces_transfer(evidence) -> None:
    rates = evidence.search({arm: partial(searched, arm) for arm in ARMS}, RATES, seed=SEARCHED[0])
    rates |= dict.fromkeys(("k=1", "k=8"), rates["k=4"])
    runs = {arm: {seed: run(arm, seed, rates[arm]) for seed in SEEDS} for arm in DIMENSIONS}
    runs["untrained"] = {seed: run("k=4", seed, rates["k=4"], epochs=0) for seed in SEEDS}
    runs["told"] = {seed: run("vector", seed, rates["vector"], learns="probe") for seed in SEEDS}
    for arm, of_seed in runs.items():
        for seed, measured in of_seed.items():
            evidence.figure(f"source, {arm}", measured["source"], seed=seed, unit="%")
            evidence.figure(f"probe, {arm}", measured["probe"], seed=seed, unit="%")
            evidence.figure(f"angle to the class mean, {arm}", measured["angle"], seed=seed, unit="degrees")
    evidence.note(f"{EPOCHS} epochs. Rates of the search are means over seeds {SEARCHED}.")
    figures = {arm: {what: {s: found[what] for s, found in of.items()} for what in of[0]} for arm, of in runs.items()}
    for arm in DIMENSIONS:
        evidence.gate(arm, figures[arm]["source"], 100 / SOURCE, by=50.0, unit="points")

    def claim(
        name: str, what: str, arms: tuple[str, str], best: dict[int, float], margin: float, unit: str = "points"
    ) -> None:
        first, floor, ceiling = (
            {seed: found[seed] - figures[arms[1]][what][seed] for seed in SEEDS}
            for found in (figures[arms[0]][what], figures["untrained"][what], best)
        )
        evidence.claim(
            f"{what}, {name}", first, at_least=margin, unit=unit, floor=floor, ceiling=ceiling, arms=arms
        )  # fmt: skip

    right, pair = dict.fromkeys(SEEDS, 100.0), ("k=4", "vector")
    claim("k=4 minus vector", "probe", pair, figures["told"]["probe"], 2.0)
    claim("k=4 minus vector", "source", pair, right, -0.5)
    claim("k=4 minus k=4 with SGD and QR", "source", ("k=4", "k=4, SGD and QR"), right, -0.5)
    wide = {seed: widest(seed) for seed in SEEDS}
    claim("k=8 minus k=1", "angle", ("k=8", "k=1"), wide, 0.0, "degrees")


if __name__ == "__main__":
    for name, settings in {"vector": {}, "untrained": {"epochs": 0}, "told": {"learns": "probe"}}.items():
        print(name, run("vector", SEARCHED[0], 0.03, **settings), flush=True)
    print(run("k=1", SEARCHED[0], 0.003), widest(SEARCHED[0]))
