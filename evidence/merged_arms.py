"""Arms that the evidence of Concrete merging (arXiv 2312.06173) compares.

- base: the pretrained network. single: each specialist on its own task.
- task arithmetic: its weight is chosen on each seed by the labels of the pictures for adaptation.
- AdaMerging (layer-wise, from that weight), 1,000 steps, and Concrete task arithmetic, 500 steps: on those pictures
  without labels. A mask begins at a half, so that Concrete has that weight or twice it, as the search finds better.
- Concrete AdaMerging: 500 steps for the mask, then 500 of AdaMerging under it.
- mask by labels: Concrete task arithmetic with the cross-entropy of the labels for its loss, the ceiling of all masks.

Rates are searched on a seed that no figure comes from, by the labels of its pictures for adaptation. Gate: the entropy
of answers to the pictures for adaptation, which is what is trained, by that of task arithmetic.
"""

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from merged_tasks import World, best_on_labels, learned, merged_by
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.merging.arithmetic import Scales, TaskArithmetic
from lightspan.merging.learned import MASK
from lightspan.methods.merging.adamerging import AdaMerging
from lightspan.methods.merging.concrete_adamerging import ConcreteAdaMerging
from lightspan.methods.merging.concrete_arithmetic import ConcreteArithmetic
from lightspan.objectives.entropy import prediction_entropy

SEARCH, STEPS = 100, 500
WEIGHTS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
RATES, LABELLED_RATE, FACTORS = (1e-4, 1e-3, 1e-2), 0.1, (1.0, 2.0)
CONCRETE, ADA, BOTH = "Concrete task arithmetic", "AdaMerging", "Concrete AdaMerging"


class MaskByLabels(ConcreteArithmetic):
    """The mask that the labels ask for."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        theta = self.span.merged(self.coefficients(), self.concrete.drawn(self.global_step))
        of_tasks = enumerate(self.task_logits(theta, batch).values())
        return torch.stack([F.cross_entropy(logits, batch["label"][:, i]) for i, logits in of_tasks]).mean()


def arithmetic(w: World) -> tuple[float, nn.Module]:
    """Task arithmetic with the weight that the labels of the pictures for adaptation choose."""
    made = {weight: merged_by(TaskArithmetic(Scales(weight)), w.models(), w.base) for weight in WEIGHTS}
    network = best_on_labels(w, made.values())
    return next(weight for weight, one in made.items() if one is network), network


def trained(arm: str, w: World, seed: int, rate: float, weight: float, factor: float) -> nn.Module:
    """Args:
    weight: of task arithmetic.
    factor: by which that of a masked merge is larger.
    """
    if arm == CONCRETE:
        return learned(ConcreteArithmetic, w, STEPS, rate, weight=factor * weight, seed=seed)[1]
    if arm == ADA:
        return learned(AdaMerging, w, 2 * STEPS, rate, start=weight, seed=seed)[1]
    with tempfile.TemporaryDirectory() as folder:
        inner, start = partial(torch.optim.SGD, lr=0.1), factor * weight
        outer = {"batch_size": 32, "inner": inner, "weight": start, "out": folder, "seed": seed}
        learned(ConcreteAdaMerging, w, STEPS, rate, **outer)  # type: ignore[arg-type]
        mask = str(Path(folder) / MASK)
        return learned(AdaMerging, w, STEPS, RATES[0], start=start, mask=mask, seed=seed)[1]


def by_mask_of_labels(w: World, seed: int, weight: float) -> nn.Module:
    return learned(MaskByLabels, w, STEPS, LABELLED_RATE, weight=2 * weight, seed=seed)[1]


@torch.no_grad()
def entropy(w: World, network: nn.Module) -> float:
    """Of answers to the pictures for adaptation, in nats, the mean over tasks."""
    return sum(float(prediction_entropy(w.heads[task](network(w.pictures[task].adapt[0])))) for task in w.tasks) / len(
        w.tasks
    )


def single(w: World, part: str = "score") -> float:
    """Accuracy of each specialist on its own task, in per cent, the mean over tasks."""
    return sum(w.accuracies(network, part, [task])[task] for task, network in w.specialists.items()) / len(w.tasks)


def measure(evidence: Any, made: Callable[[int], World], seeds: Iterable[int]) -> None:
    """Records all arms and the claims.

    Args:
        made: the tasks and specialists of a seed.
    """
    seeds, w = list(seeds), made(SEARCH)
    weight, _ = arithmetic(w)

    reached_by: dict[tuple[str, float, float], float] = {}

    def validated(arm: str, rate: float) -> float:
        for factor in FACTORS if arm != ADA else FACTORS[:1]:
            network = trained(arm, w, SEARCH, rate, weight, factor)
            reached_by[arm, rate, factor] = w.accuracy(network, "adapt")
        return max(value for (name, at, _), value in reached_by.items() if (name, at) == (arm, rate))

    arms = CONCRETE, ADA, BOTH
    rates = evidence.search({arm: partial(validated, arm) for arm in arms}, RATES)

    def best_factor(arm: str) -> float:
        return max(FACTORS, key=lambda factor: reached_by.get((arm, rates[arm], factor), 0.0))

    factors = {arm: best_factor(arm) for arm in arms}
    evidence.note("Weight of masked merges by that of task arithmetic", factors)
    reached: dict[str, dict[int, float]] = {}
    nats: dict[str, dict[int, float]] = {}
    for seed in seeds:
        w = made(seed)
        weight, merged = arithmetic(w)
        networks = {"base": w.base, "task arithmetic": merged}
        networks |= {arm: trained(arm, w, seed, rates[arm], weight, factors[arm]) for arm in arms}
        networks["mask by labels"] = by_mask_of_labels(w, seed, weight)
        for arm, network in networks.items():
            reached.setdefault(arm, {})[seed], nats.setdefault(arm, {})[seed] = w.accuracy(network), entropy(w, network)
            evidence.figure(f"accuracy, {arm}", reached[arm][seed], seed, "%")
        evidence.figure("accuracy, single", single(w), seed, "%")
    for arm in arms:
        evidence.gate(arm, nats[arm], nats["task arithmetic"], by=0.01, unit="nats", lower_is_better=True)
    for arm, over, margin, of in (
        (CONCRETE, "task arithmetic", 2.0, (CONCRETE,)),
        (BOTH, ADA, -0.5, (BOTH, ADA)),
    ):
        evidence.claim(
            f"accuracy, {arm} minus {over}",
            {seed: reached[arm][seed] - reached[over][seed] for seed in seeds},
            at_least=margin,
            unit="points",
            floor={seed: reached["base"][seed] - reached[over][seed] for seed in seeds},
            ceiling={seed: reached["mask by labels"][seed] - reached[over][seed] for seed in seeds},
            arms=of,
        )
