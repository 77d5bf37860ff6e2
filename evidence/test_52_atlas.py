"""aTLAS (arXiv 2407.02880) on turned digits: few shots of a task that lies between others, and addition.

Five source tasks are the 8 x 8 digits turned by 0, 30, 60 and 90 degrees and under one order of their pixels; the
target is a turn by 45 degrees. A network 64-128-128 with a frozen head is pretrained on the sources for 60 steps
and fine-tuned on each task (`evidence/merged_tasks.py` has the split). With 4 pictures of each class of the target:

- aTLAS: a coefficient for each of the five source vectors and six tensors.
- one scalar a vector: the same loss, five numbers.
- fine-tuning of the whole network.
- random vectors: aTLAS with Gaussian directions, the mean and deviation of each tensor, in place of the vectors.

Each arm has 100 steps on all 40 pictures, and the paper's weight decay. Addition: all six vectors, learned on the
labels of the pictures for adaptation, beside task arithmetic with its scalar, of nine, chosen on the same labels. One
search gives each arm its rate, on a third of the digits, of which no claim is measured.

The floor is the pretrained network, and the ceiling the one that was fine-tuned on the target with all its training
pictures; for addition each task's own. Gates: accuracy on the 40 pictures, or on the labels that addition learns from,
against the pretrained network.
"""

import copy
from functools import cache, partial
from statistics import fmean as mean
from typing import Any

import numpy as np
import torch
from digits import parted
from merged_tasks import Task, World, best_on_labels, learned, merged_by, shuffled_pixels, turned, world
from torch.nn import functional as F

from lightspan.backbones.vision import MLP
from lightspan.datamodules.image.sets.small import Labelled
from lightspan.merging.arithmetic import Scales, TaskArithmetic
from lightspan.merging.coefficients import TaskWise
from lightspan.merging.models import GaussianModels
from lightspan.methods.merging.atlas import Atlas

# Seeds 0 to 4 were measured without a floor and a ceiling, on all digits.
SEEDS, SEARCH, SHOTS, STEPS, DECAY = tuple(range(10, 25)), 100, 4, 100, 0.1
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
TARGET, SOURCES = "turn 45", ("turn 0", "turn 30", "turn 60", "turn 90", "order")
WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
START, TOLD, ADDITION = "zero-shot", "told much", "addition"
SCALARS, TUNING, RANDOM = "one scalar a vector", "fine-tuning on 4 shots", "random vectors"


class Scalars(Atlas):
    """One coefficient a vector for all tensors."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.learned = TaskWise(self.span.shapes, len(self.span.tasks), 0.0)


def task(seed: int, change: Any, shots: int | None = None) -> Task:
    images, labels = parted(seed, searching=seed == SEARCH)
    return Task(Labelled(np.rint(images * 255).astype(np.uint8), labels.astype(np.int64)), change, seed, shots)


@cache
def made(seed: int) -> World:
    changes = {f"turn {degrees}": turned(degrees) for degrees in (0, 30, 60, 90, 45)} | {"order": shuffled_pixels(0)}
    tasks = {name: task(seed, change) for name, change in changes.items()}
    return world(tasks, seed, pretraining=60, epochs=20, lr=1e-4, pretrained_on=SOURCES)


@cache
def shots(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    few = task(seed, turned(45), SHOTS)
    few.setup()
    found = [few.bank.sample(i, 0) for i in range(len(few.bank))]
    return torch.stack([s["image"] for s in found]), torch.stack([s["label"] for s in found])


def few_shot(seed: int, rate: float, kind: type = Atlas, random: bool = False) -> MLP:
    w, few = made(seed), {TARGET: task(seed, turned(45), SHOTS)}
    adam, models = partial(torch.optim.AdamW, weight_decay=DECAY), w.models(SOURCES)
    settings: dict[str, Any] = {"batch_size": SHOTS * 10, "adapt_on": "train", "optimizer": adam, "seed": seed}
    given = GaussianModels(list(SOURCES), seed=seed) if random else models
    return learned(kind, w, STEPS, rate, given, few, **settings)[1]


def fine_tuned(seed: int, rate: float) -> MLP:
    w, (x, y) = made(seed), shots(seed)
    network = copy.deepcopy(w.base)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=DECAY)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(w.heads[TARGET](network(x)), y).backward()
        optimizer.step()
    return network


def added(seed: int, rate: float) -> MLP:
    adam = partial(torch.optim.AdamW, weight_decay=DECAY)
    return learned(Atlas, made(seed), 300, rate, batch_size=64, optimizer=adam, val_every=20, seed=seed)[1]


ARMS: dict[str, Any] = {
    "aTLAS": few_shot,
    SCALARS: partial(few_shot, kind=Scalars),
    TUNING: fine_tuned,
    RANDOM: partial(few_shot, random=True),
}


@torch.no_grad()
def on_shots(network: MLP, seed: int) -> float:
    """Accuracy on the 40 pictures, in per cent."""
    x, y = shots(seed)
    return 100 * (made(seed).heads[TARGET](network(x)).argmax(dim=1) == y).float().mean().item()


def on_target(network: MLP, seed: int, part: str = "score") -> float:
    return made(seed).accuracies(network, part, [TARGET])[TARGET]


def normalised(w: World, network: MLP) -> float:
    """In per cent: accuracy over that of each task's specialist, the mean over tasks."""
    own = w.accuracies(network, "score")
    return mean(100 * own[t] / w.accuracies(w.specialists[t], "score", [t])[t] for t in w.tasks)


def test_coefficients_of_blocks_reach_a_task_between_others(evidence) -> None:
    scores = {arm: lambda rate, make=make: on_target(make(SEARCH, rate), SEARCH, "adapt") for arm, make in ARMS.items()}
    rates = evidence.search(scores, RATES, seed=SEARCH)
    reached: dict[str, dict[int, float]] = {arm: {} for arm in (*ARMS, START, TOLD)}
    learned_from: dict[str, dict[int, float]] = {arm: {} for arm in (*ARMS, START)}
    for seed in SEEDS:
        networks = {arm: make(seed, rates[arm]) for arm, make in ARMS.items()}
        networks |= {START: made(seed).base, TOLD: made(seed).specialists[TARGET]}
        for arm, network in networks.items():
            reached[arm][seed] = on_target(network, seed)
            evidence.figure(f"accuracy of the target, {arm}", reached[arm][seed], seed, "%")
            if arm in learned_from:
                learned_from[arm][seed] = on_shots(network, seed)
    for arm in ARMS:
        evidence.gate(arm, learned_from[arm], learned_from[START], by=3.0, unit="points")

    def over(first: str, other: str) -> dict[int, float]:
        return {seed: reached[first][seed] - reached[other][seed] for seed in SEEDS}

    for other, least in ((SCALARS, 2.0), (START, 10.0), (TUNING, 0.0)):
        evidence.claim(
            f"aTLAS minus {other}", over("aTLAS", other), at_least=least, unit="points", floor=over(START, other),
            ceiling=over(TOLD, other), arms=["aTLAS", *{other} & {*ARMS}],
        )  # fmt: skip

    def kept(first: str) -> dict[int, float]:
        """Of the gain over zero-shot, what random vectors lose, in points: at least half of it."""
        gain = over(first, START)
        return {seed: lost - gain[seed] / 2 for seed, lost in over(first, RANDOM).items()}

    evidence.claim(
        "aTLAS minus random vectors, minus half the gain over zero-shot", kept("aTLAS"), at_least=0.0, unit="points",
        floor=kept(START), ceiling=kept(TOLD), arms=["aTLAS", RANDOM],
    )  # fmt: skip


def test_coefficients_add_tasks(evidence) -> None:
    def searched(rate: float) -> float:
        return made(SEARCH).accuracy(added(SEARCH, rate), "score")

    rate = evidence.search({ADDITION: searched}, RATES[1:], what="rate, addition", seed=SEARCH)[ADDITION]
    shares: dict[str, dict[int, float]] = {name: {} for name in ("aTLAS", "task arithmetic", "pretrained")}
    learned_from: dict[str, dict[int, float]] = {"aTLAS": {}, "pretrained": {}}
    for seed in SEEDS:
        w, models = made(seed), made(seed).models()
        scalar = best_on_labels(w, [merged_by(TaskArithmetic(Scales(c)), models, w.base) for c in WEIGHTS])
        networks = {"aTLAS": added(seed, rate), "task arithmetic": scalar, "pretrained": w.base}
        for name, network in networks.items():
            shares[name][seed] = normalised(w, network)
            evidence.figure(f"normalised accuracy of six tasks, {name}", shares[name][seed], seed, "%")
        for name in learned_from:
            learned_from[name][seed] = w.accuracy(networks[name], "adapt")
    evidence.gate(ADDITION, learned_from["aTLAS"], learned_from["pretrained"], by=3.0, unit="points")
    evidence.note("600 digits to train on, 300 whose labels addition learns and chooses on, 300 to score on.")
    evidence.claim(
        "addition, aTLAS minus task arithmetic, normalised",
        {seed: shares["aTLAS"][seed] - shares["task arithmetic"][seed] for seed in SEEDS},
        at_least=3.0,
        unit="points",
        floor={seed: shares["pretrained"][seed] - shares["task arithmetic"][seed] for seed in SEEDS},
        ceiling={seed: 100.0 - shares["task arithmetic"][seed] for seed in SEEDS},
        arms=[ADDITION],
    )
