"""SAID and DID (arXiv 2012.13255) on digits: a pretrained start needs fewer random dimensions than a random one.

A net 64-128-128-10 learns either the digits 0 to 4 or all digits turned by 20 degrees, gets a new head, and is fine-
tuned on upright 5 to 9 inside Fastfood subspaces of all its weights, one projection over all of them. d90 is the
smallest dimension of a grid at which the mean over ten seeds reaches 0.9 of what the same start reaches when all
weights train; only the part of the grid around it is trained. SAID pays for the factors of its three layers out of
its dimensions. Seeds draw initial weights, head, subspace, order, and the ten images per class of the 10-shot task.
There are ten seeds, since with three the sign of SAID minus DID depended on the processor. Figures are accuracies on
test images of 5 to 9.

As in the paper, the rate of Adam is searched separately for every start, arm and dimension: on seeds 100 to 104 and
held-out training images, by factors of about three until both neighbours of the best are worse. The search is part of
the run; notes give the rates with the accuracies.

For each start there is a linear probe on its features: if that of the random start is as good, pretraining taught the
net little that 5 to 9 need. Longer pretraining and SAID are measured with the digits 0 to 4.
"""

import math
from dataclasses import dataclass
from functools import cache, partial
from statistics import mean
from typing import Literal

import torch
from intrinsic_dimension import GRID, SHARE, tensors
from scipy.ndimage import rotate
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.vision import MLP, he_normal_
from lightspan.datamodules.image.sets.small import Digits
from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.methods.supervised.classifier import Classifier
from lightspan.optim.random_subspace import RandomSubspace

SEEDS, SEARCH_SEEDS = tuple(range(10)), tuple(range(100, 105))
BATCH, EQUAL_DIM, LAYERS = 64, 32, 3
LONGEST = 50
RATES_TRIED = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
FIRST_TRIED = {"all weights": 1e-3, "DID": 3e-1, "SAID": 3e-1}


@dataclass(frozen=True)
class Start:
    """What is fine-tuned, and on how much.

    Args:
        epochs: of pretraining on 0 to 4; 0 is a random start.
        shots: training images of each class of 5 to 9; None for all.
        source: of the images it was pretrained on.
    """

    epochs: int
    shots: int | None = None
    source: Literal["0 to 4", "turned digits"] = "0 to 4"

    @property
    def name(self) -> str:
        start = (
            f"pretrained for {self.epochs} epoch{'' if self.epochs == 1 else 's'} on {self.source}"
            if self.epochs
            else "random"
        )
        return f"{start}, {self.images}"

    @property
    def images(self) -> str:
        return "all images" if self.shots is None else f"{self.shots} a class"

    @property
    def steps(self) -> int:
        return 480 if self.shots is None else 240


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        for rows in torch.randperm(len(x), generator=generator).split(BATCH)[: steps - done]:
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1


@cache
def started(epochs: int, source: str, seed: int, held_out: bool) -> Classifier:
    """What fine-tuning begins from; do not change it."""
    torch.manual_seed(seed)
    model = Classifier(MLP(Digits.image_shape, (128, 128)), 10, optimizer=torch.optim.Adam)
    x, y, _, _ = tensors(Digits, held_out)
    if source == "turned digits":
        x = torch.from_numpy(rotate(x.numpy(), 20, axes=(3, 2), reshape=False, order=1, mode="nearest"))
    else:
        x, y = x[y < 5], y[y < 5]
    descend(model, torch.optim.Adam(model.parameters(), lr=1e-3), x, y, epochs * math.ceil(len(x) / BATCH), seed)
    torch.manual_seed(1000 + seed)
    he_normal_(model.head)  # every start gets the same new head
    return model


@cache
def task(shots: int | None, seed: int, held_out: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels of 5 to 9, to train on and to judge."""
    x, y, judged_x, judged_y = tensors(Digits, held_out)
    generator = torch.Generator().manual_seed(seed)
    places = [(y == label).nonzero()[:, 0] for label in range(5, 10)]
    kept = torch.cat([p[torch.randperm(len(p), generator=generator)[:shots]] for p in places])
    return x[kept], y[kept], judged_x[judged_y > 4], judged_y[judged_y > 4]


@cache
def finetune(start: Start, arm: str, dim: int, lr: float, seed: int, held_out: bool = False) -> float:
    """Accuracy in per cent; `dim` says nothing where all weights train."""
    x, y, judged_x, judged_y = task(start.shots, seed, held_out)
    model = Classifier(MLP(Digits.image_shape, (128, 128)), 10, optimizer=torch.optim.Adam)
    model.load_state_dict(started(start.epochs, start.source, seed, held_out).state_dict())
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    if arm != "all weights":
        inner, named = partial(torch.optim.Adam, lr=lr), model.named_parameters()
        optimizer = RandomSubspace(named, inner, dim, seed=seed, layer_scales=arm == "SAID")
    descend(model, optimizer, x, y, start.steps, seed)
    with torch.no_grad():
        return 100 * (model(judged_x).argmax(1) == judged_y).float().mean().item()


@cache
def best_rate(start: Start, arm: str, dim: int) -> float:
    """From the first tried uphill, until both neighbours are worse."""
    scores: dict[int, float] = {}

    def score(i: int) -> float:
        if not 0 <= i < len(RATES_TRIED):
            return -math.inf
        if i not in scores:
            scores[i] = mean(finetune(start, arm, dim, RATES_TRIED[i], seed, held_out=True) for seed in SEARCH_SEEDS)
        return scores[i]

    best = RATES_TRIED.index(FIRST_TRIED[arm])
    while (better := max((best, best - 1, best + 1), key=score)) != best:
        best = better
    return RATES_TRIED[best]


def reached(start: Start, arm: str, dim: int = 0) -> dict[int, float]:
    """Accuracy of each seed at the best rate."""
    return {seed: finetune(start, arm, dim, best_rate(start, arm, dim), seed) for seed in SEEDS}


def d90(evidence, start: Start, first: int) -> float:
    """Of the mean over seeds: from the grid's point at `first` up to one on the line, and down to one below it."""
    whole = reached(start, "all weights")
    for seed, value in whole.items():
        evidence.figure(f"accuracy with all weights, {start.name}", value, seed, "%")
    line, points = SHARE * mean(whole.values()), {}

    def holds(dim: int) -> bool:
        points[dim] = mean(reached(start, "DID", dim).values())
        print(f"{start.name}, d = {dim}: {points[dim]:.1f} (line {line:.1f})", flush=True)
        return points[dim] >= line

    begin = GRID.index(first)
    found = next((i for i in range(begin, len(GRID)) if holds(GRID[i])), len(GRID))
    while found == begin and begin > 0 and holds(GRID[begin - 1]):
        found = begin = begin - 1
    result = GRID[found] if found < len(GRID) else math.inf
    evidence.figure(f"d90, {start.name}", result)
    curve = ", ".join(f"{dim}: {points[dim]:.1f} ({best_rate(start, 'DID', dim):g})" for dim in sorted(points))
    whole_rate = best_rate(start, "all weights", 0)
    evidence.note(f"{start.name}, line {line:.1f} % ({whole_rate:g}): mean accuracy in % of DID at d (rate): {curve}.")
    return result


def record_lines(evidence, start: Start) -> None:
    """What needs no subspace: the largest class, and a linear probe on the features of the start."""
    for seed in SEEDS:
        x, y, judged_x, judged_y = task(start.shots, seed, held_out=False)
        backbone = started(start.epochs, start.source, seed, held_out=False).backbone
        features, judged = (backbone(images).detach() for images in (x, judged_x))
        accuracy = 100 * linear_probe_accuracy(features, y, judged, judged_y)
        evidence.figure(f"accuracy of a linear probe on frozen features, {start.name}", accuracy, seed, "%")
    largest = 100 * judged_y.bincount().max().item() / len(judged_y)
    evidence.figure(f"accuracy of the largest class, {start.images}", largest, unit="%")


def test_a_pretrained_start_has_fewer_dimensions(evidence) -> None:
    for shots, first in ((None, 40), (10, 100)):
        random, *pretrained = Start(0, shots), Start(LONGEST, shots), Start(LONGEST, shots, "turned digits")
        record_lines(evidence, random)
        most = d90(evidence, random, first)
        for start in pretrained:
            record_lines(evidence, start)
            ratio = d90(evidence, start, first) / most
            evidence.claim(f"d90 of the start {start.name} over that of the random one", ratio, at_most=0.6)


def test_factors_of_layers_pay_for_themselves(evidence) -> None:
    start = Start(LONGEST)
    found = {arm: reached(start, arm, EQUAL_DIM) for arm in ("DID", "SAID")}
    for arm, accuracies in found.items():
        evidence.note(f"{arm} in {EQUAL_DIM} dimensions: rate {best_rate(start, arm, EQUAL_DIM):g}.")
        for seed, accuracy in accuracies.items():
            evidence.figure(f"accuracy in {EQUAL_DIM} dimensions, {arm}", accuracy, seed, "%")
    gains = {seed: found["SAID"][seed] - found["DID"][seed] for seed in SEEDS}
    evidence.claim(f"SAID minus DID in {EQUAL_DIM} dimensions", gains, at_least=-1.0, unit="points")
    better = mean(gain > 0 for gain in gains.values())
    evidence.claim("share of seeds on which SAID is better", better, at_least=2 / 3)
    evidence.claim("share of d that the factors take", LAYERS / EQUAL_DIM, at_most=0.1)


def test_longer_pretraining_never_needs_more_dimensions(evidence) -> None:
    found = {epochs: d90(evidence, Start(epochs), first=40) for epochs in (1, 10)}
    found[LONGEST] = d90(evidence, Start(LONGEST), first=40)
    for shorter, longer in ((1, 10), (10, LONGEST)):
        name = f"d90 after {longer} epochs of pretraining minus d90 after {shorter}"
        evidence.claim(name, found[longer] - found[shorter], at_most=0.0)
