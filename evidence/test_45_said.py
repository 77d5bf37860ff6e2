"""SAID and DID (arXiv 2012.13255): a pretrained start needs fewer random dimensions, on digits.

A net 64-128-128-10 is trained on the digits 0 to 4, gets a new head, and is fine-tuned on 5 to 9 inside Fastfood
subspaces of all its weights (one projection over all of them, not one a tensor). d90 is the smallest dimension of a
grid at which the mean over three seeds reaches 0.9 of what the same start reaches when all weights train. Seeds draw
initial weights, head, subspace, order, and the ten images of a class of the 10-shot task. Figures are accuracies on the
test images of 5 to 9. SAID spends 3 of its dimensions on the factors of the three layers.

Rates of Adam, five for all weights and five for subspaces, come from one search for every row of `RATES`, on seed 100
and training images held out: `python evidence/test_45_said.py` repeats it.
"""

import math
import sys
from dataclasses import dataclass
from functools import cache, partial
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.vision import MLP, he_normal_
from lightspan.datamodules.images import Digits
from lightspan.methods.supervised.classifier import Classifier
from lightspan.optim.random_subspace import RandomSubspace

SEEDS = (0, 1, 2)
SHARE, BATCH = 0.9, 64
GRID = [8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 56, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512]
DIRECT_RATES, SUBSPACE_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (3e-2, 1e-1, 3e-1, 1.0, 3.0)
PRETRAINED = 50
"""Epochs of the pretrained start; 0 is the random one."""


@dataclass(frozen=True)
class Start:
    """What is fine-tuned, and on how much.

    Args:
        epochs: of pretraining on 0 to 4.
        shots: training images of each class of 5 to 9; None for all.
    """

    epochs: int
    shots: int | None = None

    @property
    def name(self) -> str:
        start = f"pretrained {self.epochs} epochs" if self.epochs else "random"
        return f"{start}, {'all images' if self.shots is None else f'{self.shots} a class'}"

    @property
    def steps(self) -> int:
        return 480 if self.shots is None else 240


RATES: dict[str, tuple[float, float, float]] = {
    "pretrained 50 epochs, all images": (3e-4, 1.0, 0.03),
    "random, all images": (3e-4, 3.0, 0.03),
    "pretrained 50 epochs, 10 a class": (3e-4, 0.3, 0.1),
    "random, 10 a class": (1e-3, 1.0, 0.1),
}
"""Of all weights, DID and SAID."""


@cache
def images(held_out: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then those that judge: the test images, or training images kept out of training."""
    data = Digits(val_size=287 if held_out else 0)
    data.setup()
    return *_whole(data.train), *_whole(data.val)


def _whole(samples) -> tuple[Tensor, Tensor]:
    batch = [samples.sample(i, 0) for i in range(len(samples))]
    return torch.stack([s["image"] for s in batch]), torch.stack([s["label"] for s in batch])


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step * BATCH % len(x) < BATCH:
            order = torch.randperm(len(x), generator=generator)
        rows = order[step * BATCH % len(x) :][:BATCH]
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


@cache
def started(epochs: int, seed: int, held_out: bool) -> dict[str, Tensor]:
    """The weights that fine-tuning begins from."""
    torch.manual_seed(seed)
    model = Classifier(MLP(Digits.image_shape, (128, 128)), 10, torch.optim.Adam)
    x, y, _, _ = images(held_out)
    x, y = x[y < 5], y[y < 5]
    descend(model, torch.optim.Adam(model.parameters(), lr=1e-3), x, y, epochs * math.ceil(len(x) / BATCH), seed)
    torch.manual_seed(1000 + seed)
    he_normal_(model.head)  # both starts get the same new head
    return model.state_dict()


@cache
def finetune(
    start: Start, dim: int | None, lr: float, seed: int, scales: bool = False, held_out: bool = False
) -> float:
    """Accuracy in per cent on 5 to 9; `dim` None trains all weights."""
    x, y, judged_x, judged_y = images(held_out)
    if start.shots is not None:
        generator = torch.Generator().manual_seed(seed)
        picked = [
            places[torch.randperm(len(places), generator=generator)[: start.shots]]
            for label in range(5, 10)
            if len(places := (y == label).nonzero()[:, 0])
        ]
        x, y = x[torch.cat(picked)], y[torch.cat(picked)]
    x, y, judged_x, judged_y = x[y > 4], y[y > 4], judged_x[judged_y > 4], judged_y[judged_y > 4]
    model = Classifier(MLP(Digits.image_shape, (128, 128)), 10, torch.optim.Adam)
    model.load_state_dict(started(start.epochs, seed, held_out))
    inner = partial(torch.optim.Adam, lr=lr)
    if dim is None:
        optimizer = inner(model.parameters())
    else:
        optimizer = RandomSubspace(model.named_parameters(), inner, dim, seed=seed, layer_scales=scales)
    descend(model, optimizer, x, y, start.steps, seed)
    with torch.no_grad():
        return 100 * (model(judged_x).argmax(1) == judged_y).float().mean().item()


def rates(start: Start) -> tuple[float, float, float]:
    """Shorter pretraining takes the rates of the longest."""
    return RATES[Start(PRETRAINED if start.epochs else 0, start.shots).name]


@cache
def d90(start: Start) -> tuple[float, dict[int, float], dict[int, float], dict[int, float]]:
    """(of the mean, of each seed, accuracies of all weights, mean accuracies over the grid), DID."""
    whole = {seed: finetune(start, None, rates(start)[0], seed) for seed in SEEDS}
    line, points, own = SHARE * mean(whole.values()), {}, dict.fromkeys(SEEDS, math.inf)
    of_mean = math.inf
    for dim in GRID:
        found = {seed: finetune(start, dim, rates(start)[1], seed) for seed in SEEDS}
        points[dim] = mean(found.values())
        of_mean = min(of_mean, dim if points[dim] >= line else math.inf)
        own = {seed: min(own[seed], dim if found[seed] >= SHARE * whole[seed] else math.inf) for seed in SEEDS}
        if all(map(math.isfinite, (of_mean, *own.values()))):
            break
    print(f"{start.name}: d90 {of_mean} {own}, all weights {whole}", flush=True)
    return of_mean, own, whole, points


def record(evidence, start: Start) -> float:
    of_mean, own, whole, points = d90(start)
    for seed in SEEDS:
        evidence.figure(f"accuracy with all weights, {start.name}", whole[seed], seed, "%")
        evidence.figure(f"d90, {start.name}", own[seed], seed)
    evidence.figure(f"d90 of the mean, {start.name}", of_mean)
    curve = ", ".join(f"{dim}: {accuracy:.1f}" for dim, accuracy in points.items())
    evidence.note(f"{start.name}, DID: mean accuracy in % at d: {curve}.")
    return of_mean


def test_a_pretrained_start_has_fewer_dimensions(evidence) -> None:
    evidence.note("Rates on seed 100: " + "; ".join(f"{name} {found}" for name, found in RATES.items()))
    for shots in (None, 10):
        pretrained, drawn = (record(evidence, Start(epochs, shots)) for epochs in (PRETRAINED, 0))
        what = "all images" if shots is None else f"{shots} a class"
        evidence.claim(
            f"d90 of the pretrained start over that of the random one, {what}", pretrained / drawn, at_most=0.6
        )


def test_longer_pretraining_never_needs_more_dimensions(evidence) -> None:
    found = {epochs: record(evidence, Start(epochs)) for epochs in (1, 10)} | {PRETRAINED: d90(Start(PRETRAINED))[0]}
    for shorter, longer in ((1, 10), (10, PRETRAINED)):
        name = f"d90 after {longer} minus d90 after {shorter} epochs of pretraining"
        evidence.claim(name, found[longer] - found[shorter], at_most=0.0)


def test_factors_of_layers_pay_for_themselves(evidence) -> None:
    gains, start = {}, Start(PRETRAINED)
    _, did_rate, said_rate = rates(start)
    for seed in SEEDS:
        did, said = finetune(start, 32, did_rate, seed), finetune(start, 32, said_rate, seed, scales=True)
        evidence.figure("accuracy in 32 dimensions, DID", did, seed, "%")
        evidence.figure("accuracy in 32 dimensions, SAID", said, seed, "%")
        gains[seed] = said - did
    evidence.claim("SAID minus DID in 32 dimensions", gains, at_least=-1.0, unit="points")
    evidence.claim("seeds of 3 on which SAID is better", sum(gain > 0 for gain in gains.values()), at_least=2.0)
    evidence.figure("share of d that SAID's 3 factors take", 3 / 32)


if __name__ == "__main__":
    torch.set_num_threads(1)
    starts = [Start(epochs, shots) for shots in (None, 10) for epochs in (PRETRAINED, 0)]
    for start in [start for start in starts if len(sys.argv) < 2 or start.name in sys.argv[1:]]:
        best = []
        for tried, dim, scales in (
            (DIRECT_RATES, None, False),
            (SUBSPACE_RATES, 32, False),
            (SUBSPACE_RATES, 32, True),
        ):
            scores = {rate: finetune(start, dim, rate, 100, scales, held_out=True) for rate in tried}
            best.append(max(scores, key=scores.__getitem__))
            print(start.name, dim or "all", scales, {r: round(s, 1) for r, s in scores.items()}, flush=True)
        print(f'    "{start.name}": ({", ".join(f"{rate:g}" for rate in best)}),', flush=True)
