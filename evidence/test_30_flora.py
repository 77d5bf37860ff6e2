"""FLoRA (arXiv 2405.14739): a change of convolutions in Tucker form against LoRA on flattened kernels.

Known truth: from 512 inputs, a convolutional student has to learn a teacher whose kernels differ from its own by a
change of Tucker rank (4, 4, 2, 2). FLoRA has these ranks and 236 numbers per layer; flatten-LoRA reads a kernel as a
matrix (O k) x (C k) and has rank 2 and 240 numbers. The floor is the student as it is, and the ceiling FLoRA with the
true factors, of which only the cores train. The second truth, a change of rank 2 in that matrix, gives figures alone.

Digits: a small network pretrained on scikit-learn's digits is adapted to inverted digits turned by 20 degrees, 20
images per class. Convolutions get adapters and the rest is frozen, the head too; full fine-tuning trains everything.
Two budgets, a twentieth and a tenth of the network's numbers. The floor is the pretrained network, and the ceiling full
fine-tuning on four times as many images.

Rates come from one search for all arms: on a world of its own, and on a third of the digits, of which no claim is
measured. Each rate of an adapter is scored by the best of four scales. On digits all arms warm up for a tenth of
their steps: without it FLoRA of rank 4 ended at chance on one seed of ten, all ReLUs of its first layer dead.
"""

import copy
import math
from dataclasses import dataclass
from functools import cache, partial
from statistics import mean

import numpy as np
import torch
from digits import accuracy, parted, pretrain, step
from scipy.ndimage import rotate
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.adapter import Adapter, AdapterSpec
from lightspan.adapters.flora import FLoRA
from lightspan.adapters.inject import adapt, adapted_layers
from lightspan.subspaces.tucker import compose

# Seeds 0 to 9 of digits were measured without warm-up.
SEEDS, DIGITS_SEEDS, SEARCH_SEEDS = (0, 1, 2, 3, 4), tuple(range(10, 20)), (100, 101)
FIT_RATES, RATES, SCALES = (1e-2, 3e-2, 1e-1), (3e-3, 1e-2, 3e-2), (1.0, 4.0, 16.0, 64.0)
CHANNELS, INPUTS, FIT_STEPS, FIT_BATCH = 20, 512, 400, 64
EPOCHS, ADAPT_STEPS, WARMUP, SHOTS = 15, 200, 20, 20
ARMS, TRUE_RANKS = ("FLoRA", "flatten-LoRA"), (4, 4, 2, 2)


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


def changed(model: nn.Sequential, truth: str) -> tuple[nn.Sequential, list[list[Tensor]]]:
    """The teacher, each kernel plus a change with half the kernel's norm, and the factors of Tucker changes."""
    kept = []
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            shape = layer.weight.shape
            factors = [torch.randn(s, r) for s, r in zip(shape, TRUE_RANKS, strict=True)]
            if truth == "Tucker":
                change = compose(torch.randn(TRUE_RANKS), factors)
            else:
                rows, columns = shape[0] * shape[2], shape[1] * shape[3]
                change = unflattened(torch.randn(rows, 2) @ torch.randn(2, columns), tuple(shape))
            layer.weight += change * (0.5 * layer.weight.norm() / change.norm())
            kept.append(factors)
    return model, kept


def fit(arm: str, truth: str, seed: int, rate: float, oracle: bool = False) -> dict[str, float]:
    """Mean squared errors on unseen inputs over the variance of the target, before and after, and trained numbers."""
    (teacher, factors), model = changed(student(seed), truth), student(seed)
    x, unseen = (torch.randn(INPUTS, CHANNELS, 6, 6) for _ in range(2))
    with torch.no_grad():
        y, unseen_y = teacher(x), teacher(unseen)

    @torch.no_grad()
    def error() -> float:
        return (F.mse_loss(model(unseen), unseen_y) / unseen_y.var()).item()

    before = error()
    injection = adapt(model, ["0", "2", "4"], spec(arm, 4 if arm == "FLoRA" else 2, 1.0), show=False)
    if oracle:
        for layer, true in zip(adapted_layers(model).values(), factors, strict=True):
            for factor, told in zip(layer.adapters["default"].factors, true, strict=True):
                factor.data.copy_(torch.linalg.qr(told).Q)
                factor.requires_grad_(False)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    for _ in range(FIT_STEPS):
        rows = torch.randint(INPUTS, (FIT_BATCH,))
        optimizer.zero_grad()
        F.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    return {"untrained": before, "error": error(), "numbers": injection.trainable}


def test_a_tucker_change_is_found_at_half_the_error_of_flattened_kernels(evidence) -> None:
    torch.set_num_threads(1)

    def searched(arm: str, rate: float) -> float:
        return -fit(arm, "Tucker", SEARCH_SEEDS[0], rate)["error"]

    names = {arm: f"{arm}, known truth" for arm in ARMS}
    rates = evidence.search({names[arm]: partial(searched, arm) for arm in ARMS}, FIT_RATES, what="rate, known truth")
    runs = {arm: {seed: fit(arm, "Tucker", seed, rates[names[arm]]) for seed in SEEDS} for arm in ARMS}
    runs["true factors"] = {seed: fit("FLoRA", "Tucker", seed, rates[names["FLoRA"]], oracle=True) for seed in SEEDS}
    for arm, by_seed in runs.items():
        for seed, found in by_seed.items():
            evidence.figure(f"relative test error, {arm}", found["error"], seed)
    for arm in ARMS:
        error, untrained = ({s: run[name] for s, run in runs[arm].items()} for name in ("error", "untrained"))
        evidence.gate(names[arm], error, untrained, by=0.1, lower_is_better=True)
        evidence.figure(f"trained numbers, {arm}", runs[arm][SEEDS[0]]["numbers"])
        for seed in SEEDS:
            other = fit(arm, "matrix", seed, rates[names[arm]])["error"]
            evidence.figure(f"relative test error, {arm}, truth of matrix rank 2", other, seed)

    def over_flattened(arm: str, name: str) -> dict[int, float]:
        return {seed: runs[arm][seed][name] / runs["flatten-LoRA"][seed]["error"] for seed in SEEDS}

    evidence.claim(
        "test error, FLoRA over flatten-LoRA, Tucker truth", over_flattened("FLoRA", "error"), at_most=0.5,
        floor=over_flattened("FLoRA", "untrained"), ceiling=over_flattened("true factors", "error"),
        arms=[*names.values()],
    )  # fmt: skip


# Digits


@cache
def splits(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Upright images to pretrain on, and of the new domain those of "few", which is 20 of each class, those and the
    upright ones in "many", and half as many others to judge by. The seeds of the search have a third of all digits, the
    others the rest.
    """
    images, labels = parted(seed, searching=seed in SEARCH_SEEDS)
    few = np.concatenate([np.flatnonzero(labels == digit)[:SHOTS] for digit in range(10)])
    rest = np.setdiff1d(np.arange(len(labels)), few)
    upright, judged = np.split(rest, [2 * len(rest) // 3])
    shifted = 1 - rotate(images, 20, axes=(2, 1), reshape=False, order=1)

    def tensors(x: np.ndarray, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.tensor(x[rows], dtype=torch.float32)[:, None], torch.tensor(labels[rows])

    many = np.concatenate([few, upright])
    own = {name: tensors(shifted, rows) for name, rows in (("few", few), ("many", many), ("judged", judged))}
    return own | {"upright": tensors(images, upright)}


@cache
def pretrained(seed: int) -> nn.Sequential:
    """What is adapted; do not change it."""
    torch.manual_seed(seed)
    convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)]
    features = [part for c in convolutions for part in (c, nn.ReLU())]
    model = nn.Sequential(*features, nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    pretrain(model, *splits(seed)["upright"], EPOCHS, batch=64, lr=2e-3)
    return model


Arm = tuple[str, int]
FULL: Arm = ("full", 0)
BUDGETS: dict[str, tuple[Arm, Arm]] = {
    "small": (("FLoRA", 4), ("flatten-LoRA", 2)),
    "medium": (("FLoRA", 8), ("flatten-LoRA", 5)),
}
"""FLoRA's ranks of channels, and flatten-LoRA's, which gets a few numbers more."""


def percents(model: nn.Module, seed: int) -> dict[str, float]:
    """Accuracy on the images to adapt to, and on those to judge by."""
    return {name: accuracy(model, *splits(seed)[name]) for name in ("few", "judged")}


@cache
def adapted(arm: Arm, seed: int, rate: float, scale: float, on: str = "few") -> dict[str, float]:
    """`percents` after `ADAPT_STEPS` steps of Adam, and the trained numbers."""
    model = copy.deepcopy(pretrained(seed))
    torch.manual_seed(seed)
    if arm == FULL:
        numbers = sum(p.numel() for p in model.parameters())
    else:
        numbers = adapt(model, ["0", "2", "4"], spec(*arm, scale), show=False).trainable
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
    x, y = splits(seed)[on]
    for _ in range(ADAPT_STEPS):
        rows = torch.randint(len(x), (64,))
        step(model, optimizer, x[rows], y[rows])
        schedule.step()
    return percents(model, seed) | {"numbers": numbers}


@cache
def searched(arm: Arm, rate: float) -> tuple[float, float]:
    """The best scale's accuracy, and the scale."""
    scales = (1.0,) if arm == FULL else SCALES
    scores = {scale: mean(adapted(arm, seed, rate, scale)["judged"] for seed in SEARCH_SEEDS) for scale in scales}
    best = max(scores, key=scores.__getitem__)
    return scores[best], best


def test_kernels_in_tucker_form_adapt_to_a_shifted_domain(evidence) -> None:
    torch.set_num_threads(1)
    names = {FULL: "full"} | {arm: f"{arm[0]} of rank {arm[1]}" for pair in BUDGETS.values() for arm in pair}
    scores = {name: lambda rate, arm=arm: searched(arm, rate)[0] for arm, name in names.items()}
    rates = evidence.search(scores, RATES, what="rate, digits")
    settings = {arm: (rates[name], searched(arm, rates[name])[1]) for arm, name in names.items()}
    evidence.note("Scales of the adapters", {name: settings[arm][1] for arm, name in names.items() if arm != FULL})
    runs = {name: {s: adapted(arm, s, *settings[arm]) for s in DIGITS_SEEDS} for arm, name in names.items()}
    runs["none"] = {seed: percents(pretrained(seed), seed) for seed in DIGITS_SEEDS}
    runs["many images"] = {seed: adapted(FULL, seed, *settings[FULL], on="many") for seed in DIGITS_SEEDS}
    for name, by_seed in runs.items():
        for seed, found in by_seed.items():
            evidence.figure(f"accuracy, {name}", found["judged"], seed, "%")
    start = {seed: max(found["few"], 10.1) for seed, found in runs["none"].items()}  # or chance, beyond rounding
    for name in names.values():
        evidence.gate(name, {s: found["few"] for s, found in runs[name].items()}, start, by=20.0, unit="points")
        evidence.figure(f"trained numbers, {name}", runs[name][DIGITS_SEEDS[0]]["numbers"])

    def gap(first: str, second: str) -> dict[int, float]:
        return {seed: runs[first][seed]["judged"] - runs[second][seed]["judged"] for seed in DIGITS_SEEDS}

    for budget, pair in BUDGETS.items():
        ours, theirs = (names[arm] for arm in pair)
        evidence.claim(
            f"{budget}: accuracy, FLoRA minus flatten-LoRA", gap(ours, theirs), at_least=0.5, unit="points",
            floor=gap("none", theirs), ceiling=gap("many images", theirs), arms=[ours, theirs],
        )  # fmt: skip
        evidence.claim(
            f"{budget}: accuracy, full minus FLoRA", gap("full", ours), at_most=2.0, unit="points",
            floor=gap("full", "none"), ceiling=gap("full", "many images"), arms=["full", ours],
        )  # fmt: skip
