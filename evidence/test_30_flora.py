"""FLoRA (arXiv 2405.14739): a change of convolutions in Tucker form against LoRA on flattened kernels.

Known truth: from 512 inputs, a convolutional student has to learn a teacher whose kernels differ from its own by a
change of Tucker rank (4, 4, 2, 2). FLoRA has these ranks and 236 numbers per layer; flatten-LoRA reads a kernel as a
matrix (O k) x (C k) and has rank 2 and 240 numbers. The second truth is a change of rank 2 in that matrix.

Digits: a small network pretrained on scikit-learn's digits is adapted to inverted digits turned by 20 degrees, 20
images per class. Convolutions get adapters and the rest is frozen, the head too; full fine-tuning trains everything.
The same claims are made at three budgets, the smallest with a twentieth of the network's numbers, the largest with a
quarter, over 20 seeds, since on a single one either arm can lead by several points.

Rates and scales of all arms come from one search. Known truth: four settings per arm, on seed 100. Digits: on seeds 100
to 102 and images that no claim uses, starting at (rate, scale) = (1e-2, 1) and moving to better neighbours, by factors
of about three in the rate and four in the scale, until all neighbours are worse. `python evidence/test_30_flora.py`
repeats it.
"""

import copy
import itertools
import math
from dataclasses import dataclass
from functools import cache
from statistics import mean, median

import numpy as np
import torch
from digits import accuracy, pretrain, shuffled, step
from scipy.ndimage import rotate
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.adapter import Adapter, AdapterSpec
from lightspan.adapters.flora import FLoRA
from lightspan.adapters.inject import adapt
from lightspan.subspaces.tucker import compose

SEEDS, DIGITS_SEEDS, SEARCH_SEEDS = range(5), range(20), (100, 101, 102)
RATES_TRIED, SCALES_TRIED = (
    (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    (1 / 64, 1 / 16, 0.25, 1.0, 4.0, 16.0, 64.0),
)
FIT_RATES, FIT_SCALES = (1e-2, 3e-2), (1.0, 4.0)
CHANNELS, INPUTS, FIT_STEPS, FIT_BATCH = 20, 512, 400, 64
EPOCHS, ADAPT_STEPS, SHOTS = 15, 200, 20


@dataclass(frozen=True)
class FlattenLoRA(AdapterSpec):
    """LoRA on a kernel [O C k k] as the matrix (O k) x (C k), as the paper's comparison has it; scaled by `scale`."""

    rank: int
    scale: float

    def build(self, layer: nn.Module, name: str) -> "FlattenLoRAUpdate":
        return FlattenLoRAUpdate(layer, self.rank, self.scale)


class FlattenLoRAUpdate(Adapter):
    """Materialises its change in every step; only its function is compared here."""

    def __init__(self, layer: nn.Module, rank: int, scale: float) -> None:
        super().__init__(layer)
        out, channels, height, width = self.layer.weight
        self.up = nn.Parameter(torch.zeros(out * height, rank))
        self.down = nn.Parameter(torch.empty(rank, channels * width))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.scale = scale

    def delta(self) -> Tensor:
        return unflattened(self.scale * self.up @ self.down, self.layer.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer.convolve(x, self.delta())


def unflattened(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A kernel [O C h w] from the matrix (O h) x (C w)."""
    out, channels, height, width = shape
    return matrix.view(out, height, channels, width).transpose(1, 2)


def spec(arm: str, rank: int, scale: float) -> AdapterSpec:
    return FLoRA(rank=rank, kernel_rank=2, scale=scale) if arm == "FLoRA" else FlattenLoRA(rank, scale)


# Known truth


def student(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(3)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def changed(model: nn.Sequential, truth: str) -> nn.Sequential:
    """The teacher: each kernel plus a change with half the kernel's norm."""
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            shape = layer.weight.shape
            if truth == "Tucker":
                ranks = (4, 4, 2, 2)
                change = compose(torch.randn(ranks), [torch.randn(s, r) for s, r in zip(shape, ranks, strict=True)])
            else:
                rows, columns = shape[0] * shape[2], shape[1] * shape[3]
                change = unflattened(torch.randn(rows, 2) @ torch.randn(2, columns), tuple(shape))
            layer.weight += change * (0.5 * layer.weight.norm() / change.norm())
    return model


def fit(arm: str, truth: str, seed: int, rate: float, scale: float) -> tuple[float, int]:
    """(mean squared error on unseen inputs over the variance of the target, trained numbers)."""
    teacher, model = changed(student(seed), truth), student(seed)
    x, unseen = (torch.randn(INPUTS, CHANNELS, 6, 6) for _ in range(2))
    with torch.no_grad():
        y, unseen_y = teacher(x), teacher(unseen)
    injection = adapt(model, ["0", "2", "4"], spec(arm, 4 if arm == "FLoRA" else 2, scale), show=False)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    for _ in range(FIT_STEPS):
        rows = torch.randint(INPUTS, (FIT_BATCH,))
        optimizer.zero_grad()
        F.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (F.mse_loss(model(unseen), unseen_y) / unseen_y.var()).item(), injection.trainable


# Digits


@cache
def splits(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """900 images to pretrain on, and of the new domain 200 to adapt to, 200 to choose settings on, 297 to test on."""
    images, labels = shuffled(seed)
    shifted = 1 - rotate(images, 20, axes=(2, 1), reshape=False, order=1)
    pool = np.arange(900, 1300)
    few = np.concatenate([pool[labels[900:1300] == digit][:SHOTS] for digit in range(10)])
    parts = {"adapt": few, "choose": np.arange(1300, 1500), "test": np.arange(1500, len(images))}
    cut = {"pretrain": (images[:900], labels[:900])} | {name: (shifted[p], labels[p]) for name, p in parts.items()}
    return {name: (torch.tensor(x, dtype=torch.float32)[:, None], torch.tensor(y)) for name, (x, y) in cut.items()}


@cache
def pretrained(seed: int) -> nn.Sequential:
    """What is adapted; do not change it."""
    torch.manual_seed(seed)
    convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)]
    features = [part for c in convolutions for part in (c, nn.ReLU())]
    model = nn.Sequential(*features, nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    pretrain(model, *splits(seed)["pretrain"], EPOCHS, batch=64, lr=2e-3)
    return model


@cache
def adapted_accuracy(arm: str, rank: int, seed: int, rate: float, scale: float, on: str) -> tuple[float, int]:
    """(accuracy in percent, trained numbers)."""
    parts, model = splits(seed), copy.deepcopy(pretrained(seed))
    torch.manual_seed(seed)
    if arm == "full":
        numbers = sum(p.numel() for p in model.parameters())
    else:
        numbers = adapt(model, ["0", "2", "4"], spec(arm, rank, scale), show=False).trainable
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=rate)
    x, y = parts["adapt"]
    for _ in range(ADAPT_STEPS):
        rows = torch.randint(len(x), (64,))
        step(model, optimizer, x[rows], y[rows])
    return accuracy(model, *parts[on]), numbers


FIT = {"FLoRA": (3e-2, 1.0), "flatten-LoRA": (3e-2, 1.0)}
RANKS = {"small": (4, 2), "medium": (8, 5), "large": (16, 11)}
"""Of FLoRA's channels and of flatten-LoRA, which gets a few numbers more."""
DIGITS = {
    ("full", 0): (3e-3, 1.0),
    ("FLoRA", 4): (1e-2, 16.0),
    ("flatten-LoRA", 2): (1e-2, 4.0),
    ("FLoRA", 8): (1e-2, 16.0),
    ("flatten-LoRA", 5): (1e-2, 4.0),
    ("FLoRA", 16): (1e-2, 4.0),
    ("flatten-LoRA", 11): (1e-2, 4.0),
}
"""(rate, scale) by arm and rank."""
FULL = ("full", 0)


def test_a_tucker_change_is_found_at_half_the_error_of_flattened_kernels(evidence) -> None:
    ratio, other, budget = {}, {}, 0.0
    for truth in ("Tucker", "matrix"):
        for seed in SEEDS:
            found = {arm: fit(arm, truth, seed, *FIT[arm]) for arm in FIT}
            for arm, (error, _) in found.items():
                evidence.figure(f"relative test error, {truth} truth, {arm}", error, seed)
            (ratio if truth == "Tucker" else other)[seed] = found["FLoRA"][0] / found["flatten-LoRA"][0]
            budget = abs(found["FLoRA"][1] / found["flatten-LoRA"][1] - 1)
    evidence.note(f"Rates and scales by one search on seeds {SEARCH_SEEDS}", FIT)
    evidence.claim("test error, FLoRA over flatten-LoRA, Tucker truth", ratio, at_most=0.5)
    evidence.claim("trained numbers, difference of the two", 100 * budget, at_most=5.0, unit="%")
    for seed, value in other.items():
        evidence.figure("test error, FLoRA over flatten-LoRA, truth of matrix rank 2", value, seed)


def test_kernels_in_tucker_form_adapt_to_a_shifted_domain(evidence) -> None:
    evidence.note(f"Digits: rates and scales by one search on seeds {SEARCH_SEEDS}", DIGITS)
    full = {seed: adapted_accuracy(*FULL, seed, *DIGITS[FULL], "test") for seed in DIGITS_SEEDS}
    for seed, (percent, numbers) in full.items():
        evidence.figure(f"accuracy, full ({numbers} numbers)", percent, seed, "%")
    for budget, ranks in RANKS.items():
        over_lora, behind_full, numbers = {}, {}, {}
        for seed in DIGITS_SEEDS:
            percents = {}
            for arm, rank in zip(FIT, ranks, strict=True):
                percents[arm], numbers[arm] = adapted_accuracy(arm, rank, seed, *DIGITS[arm, rank], "test")
                evidence.figure(f"accuracy, {budget}, {arm} ({numbers[arm]} numbers)", percents[arm], seed, "%")
            over_lora[seed] = percents["FLoRA"] - percents["flatten-LoRA"]
            behind_full[seed] = full[seed][0] - percents["FLoRA"]
        # A run that collapses, as one of flatten-LoRA's largest does, can make a mean.
        median_gain = median(over_lora.values())
        evidence.figure(f"{budget}: accuracy, FLoRA minus flatten-LoRA, median over seeds", median_gain, unit="points")
        share = numbers["FLoRA"] / numbers["flatten-LoRA"]
        evidence.claim(f"{budget}: accuracy, FLoRA minus flatten-LoRA", over_lora, at_least=0.5, unit="points")
        evidence.claim(f"{budget}: accuracy, full minus FLoRA", behind_full, at_most=2.0, unit="points")
        evidence.claim(f"{budget}: trained numbers, FLoRA over flatten-LoRA", share, at_most=1.0)


def search(arm: str, rank: int) -> tuple[float, float]:
    """(rate, scale) whose neighbours are all worse on images to choose by."""
    scores: dict[tuple[int, int], float] = {}

    def score(place: tuple[int, int]) -> float:
        r, s = place
        if not (0 <= r < len(RATES_TRIED) and 0 <= s < len(SCALES_TRIED)):
            return -math.inf
        if place not in scores:
            settings = RATES_TRIED[r], SCALES_TRIED[s], "choose"
            scores[place] = mean(adapted_accuracy(arm, rank, seed, *settings)[0] for seed in SEARCH_SEEDS)
        return scores[place]

    def around(place: tuple[int, int]) -> list[tuple[int, int]]:
        r, s = place
        return [place, (r - 1, s), (r + 1, s)] + ([(r, s - 1), (r, s + 1)] if (arm, rank) != FULL else [])

    best = RATES_TRIED.index(1e-2), SCALES_TRIED.index(1.0)
    while (better := max(around(best), key=score)) != best:
        best = better
    print(f"# {arm}, {rank}: {scores[best]:.1f} % after {len(scores)} settings", flush=True)
    return RATES_TRIED[best[0]], SCALES_TRIED[best[1]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for key in [FULL, *((arm, rank) for ranks in RANKS.values() for arm, rank in zip(FIT, ranks, strict=True))]:
        print(f"    {key}: {search(*key)},".replace("'", '"'), flush=True)
    for arm in FIT:
        means = {
            (r, s): fit(arm, "Tucker", SEARCH_SEEDS[0], r, s)[0] for r, s in itertools.product(FIT_RATES, FIT_SCALES)
        }
        print("fit", arm, {k: round(float(v), 5) for k, v in means.items()}, min(means, key=means.get), flush=True)
