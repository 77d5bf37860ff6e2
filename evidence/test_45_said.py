"""SAID and DID (arXiv 2012.13255) on digits: does a pretrained start need fewer random dimensions than a random one?

A net 64-128-128-10 learns the digits 0 to 4, gets a new head, and is fine-tuned on 5 to 9 inside Fastfood subspaces of
all its weights, on all images or on ten of each class. d90 is, for each seed, the smallest dimension of a grid at which
it reaches 0.9 of what the same start reaches when all weights train (intrinsic_dimension.py). Besides, SAID and DID
have 32 dimensions, of which SAID pays for the factors of its three layers. Seeds draw initial weights, head, subspace,
order, and the ten images. Figures are accuracies on test images of 5 to 9. SAID minus DID differs by six points
between seeds: it has twenty.

Floors: a random start of another seed; the network before fine-tuning. Ceilings: a start that learned all digits, 5 to
9 among them; all weights. Gates: digits 0 to 4 for the pretrained start, 5 to 9 for the others. Rates of every start
and arm are searched on three seeds of their own and held-out training images, those of d90 at 50 dimensions.

d90 is a few steps of the grid from either start: 5 to 9 are too easy to tell much, as an earlier record found, which
also had turned digits to pretrain on.
"""

import math
from dataclasses import dataclass
from functools import cache, partial
from statistics import mean
from typing import Literal

import torch
from intrinsic_dimension import SHARE, climbed, tensors
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.vision import MLP, he_normal_
from lightspan.datamodules.image.sets.small import Digits
from lightspan.methods.supervised.classifier import Classifier
from lightspan.optim.random_subspace import RandomSubspace

SEEDS, SCALE_SEEDS, SEARCH_SEEDS = tuple(range(10)), tuple(range(20)), (100, 101, 102)
BATCH, EQUAL_DIM, SEARCHED_AT, LAYERS = 64, 32, 50, 3
LONGEST, SHOTS = 50, 10
RATES, WHOLE_RATES = (3e-2, 1e-1, 3e-1, 1.0), (3e-4, 1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Start:
    """What is fine-tuned, and on how much.

    Args:
        epochs: of pretraining; 0 is a random start.
        shots: training images of each class of 5 to 9; None for all.
        source: what it was pretrained on.
    """

    epochs: int
    shots: int | None = None
    source: Literal["0 to 4", "all digits"] = "0 to 4"

    @property
    def name(self) -> str:
        start = f"{self.epochs} epochs of {self.source}" if self.epochs else "random"
        return f"{start}, {'all images' if self.shots is None else f'{self.shots} a class'}"

    @property
    def steps(self) -> int:
        return 480 if self.shots is None else 240

    @property
    def first(self) -> int:
        """Where on the grid d90 is sought first."""
        return 50 if self.shots is None else 100


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
def started(epochs: int, source: str, seed: int, held_out: bool) -> tuple[Classifier, float]:
    """What fine-tuning begins from, which nobody changes, and its accuracy on 0 to 4 before it gets a new head."""
    torch.manual_seed(seed)
    model = Classifier(MLP(Digits.image_shape, (128, 128)), 10, optimizer=torch.optim.Adam)
    x, y, judged_x, judged_y = tensors(Digits, held_out)
    if source == "0 to 4":
        x, y = x[y < 5], y[y < 5]
    descend(model, torch.optim.Adam(model.parameters(), lr=1e-3), x, y, epochs * math.ceil(len(x) / BATCH), seed)
    of_source = accuracy(model, judged_x[judged_y < 5], judged_y[judged_y < 5])
    torch.manual_seed(1000 + seed)
    he_normal_(model.head)  # every start gets the same new head
    return model, of_source


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In per cent."""
    return 100 * (model(x).argmax(1) == y).float().mean().item()


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
    """Accuracy in per cent; `dim` says nothing where all weights train, or none ("before")."""
    x, y, judged_x, judged_y = task(start.shots, seed, held_out)
    model = Classifier(MLP(Digits.image_shape, (128, 128)), 10, optimizer=torch.optim.Adam)
    model.load_state_dict(started(start.epochs, start.source, seed, held_out)[0].state_dict())
    if arm == "before":
        return accuracy(model, judged_x, judged_y)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    if arm != "all weights":
        inner, named = partial(torch.optim.Adam, lr=lr), model.named_parameters()
        optimizer = RandomSubspace(named, inner, dim, seed=seed, layer_scales=arm == "SAID")
    descend(model, optimizer, x, y, start.steps, seed)
    return accuracy(model, judged_x, judged_y)


def d90(evidence, start: Start, rate: float, whole_rate: float) -> tuple[dict[int, float], dict[int, float]]:
    """Of each seed, and the accuracy there."""
    dims, accuracies = {}, {}
    for seed in SEEDS:
        whole = finetune(start, "all weights", 0, whole_rate, seed)
        reached: dict[float, float] = {}

        def reaches(dim: int, seed: int = seed, whole: float = whole, reached: dict[float, float] = reached) -> bool:
            reached[dim] = finetune(start, "DID", dim, rate, seed)
            return reached[dim] >= SHARE * whole

        dims[seed] = climbed(reaches, start.first)
        accuracies[seed] = reached.get(dims[seed], math.nan)
        evidence.figure(f"accuracy with all weights, {start.name}", whole, seed, "%")
        evidence.figure(f"d90, {start.name}", dims[seed], seed)
    print(start.name, dims, flush=True)
    return dims, accuracies


def searched(evidence, arms: dict[str, tuple[Start, str, int]], rates: tuple[float, ...], what: str) -> dict:
    def score(start: Start, arm: str, dim: int, rate: float) -> float:
        return mean(finetune(start, arm, dim, rate, seed, held_out=True) for seed in SEARCH_SEEDS)

    return evidence.search(
        {name: partial(score, *arm) for name, arm in arms.items()}, rates, what=what, seed=SEARCH_SEEDS[0]
    )


def test_dimensions_of_a_pretrained_start(evidence) -> None:
    for shots in (None, SHOTS):
        random, pretrained, told = Start(0, shots), Start(LONGEST, shots), Start(LONGEST, shots, "all digits")
        starts = {start.name: start for start in (random, pretrained, told)}
        rates = searched(evidence, {n: (start, "DID", SEARCHED_AT) for n, start in starts.items()}, RATES, "rate")
        of_whole = searched(
            evidence,
            {f"{name}, all weights": (start, "all weights", 0) for name, start in starts.items()},
            WHOLE_RATES,
            "rate with all weights",
        )
        found = {
            name: d90(evidence, one, rates[name], of_whole[f"{name}, all weights"]) for name, one in starts.items()
        }
        before = {seed: finetune(random, "before", 0, 0.0, seed) for seed in SEEDS}
        evidence.gate(random.name, found[random.name][1], before, by=30.0, unit="points")
        of_source = [
            {seed: started(start.epochs, start.source, seed, False)[1] for seed in SEEDS}
            for start in (pretrained, random)
        ]
        evidence.gate(pretrained.name, *of_source, by=50.0, unit="points")
        dims = {name: of for name, (of, _) in found.items()}

        def over(first: dict[int, float], second: dict[int, float] = dims[random.name]) -> dict[int, float]:
            return {seed: first[seed] / second[seed] for seed in SEEDS}

        evidence.claim(
            f"d90, {pretrained.name} over {random.name}",
            over(dims[pretrained.name]),
            at_most=0.6,
            floor=over({seed: dims[random.name][SEEDS[seed - 1]] for seed in SEEDS}),
            ceiling=over(dims[told.name]),
            arms=(pretrained.name, random.name),
        )


def test_factors_of_layers_pay_for_themselves(evidence) -> None:
    start, arms = Start(LONGEST), ("SAID", "DID")
    rates = searched(evidence, {arm: (start, arm, EQUAL_DIM) for arm in arms}, RATES, "rate")
    whole = searched(evidence, {"all weights": (start, "all weights", 0)}, WHOLE_RATES, "rate")["all weights"]
    found = {arm: {seed: finetune(start, arm, EQUAL_DIM, rates[arm], seed) for seed in SCALE_SEEDS} for arm in arms}
    found["all weights"] = {seed: finetune(start, "all weights", 0, whole, seed) for seed in SCALE_SEEDS}
    found["before"] = {seed: finetune(start, "before", 0, 0.0, seed) for seed in SCALE_SEEDS}
    for arm, of_seed in found.items():
        for seed, value in of_seed.items():
            where = f"{arm} in {EQUAL_DIM} dimensions" if arm in arms else arm
            evidence.figure(f"accuracy, {where}", value, seed, "%")
    for arm in arms:
        evidence.gate(arm, found[arm], found["before"], by=30.0, unit="points")

    def minus_did(arm: str) -> dict[int, float]:
        return {seed: found[arm][seed] - found["DID"][seed] for seed in SCALE_SEEDS}

    evidence.claim(
        f"SAID minus DID in {EQUAL_DIM} dimensions", minus_did("SAID"), at_least=-1.0, unit="points", arms=arms,
        floor=minus_did("before"), ceiling=minus_did("all weights"),
    )  # fmt: skip
    evidence.note(f"SAID has {LAYERS} of its {EQUAL_DIM} dimensions for factors.")


if __name__ == "__main__":
    for shots in (None, SHOTS):
        for start in (Start(0, shots), Start(LONGEST, shots), Start(LONGEST, shots, "all digits")):
            line = finetune(start, "all weights", 0, 1e-3, 100, held_out=True)
            dims = {dim: finetune(start, "DID", dim, 0.1, 100, held_out=True) for dim in (10, 20, 30, 50, 70, 100)}
            print(start.name, started(start.epochs, start.source, 100, True)[1], line, dims, flush=True)
