"""CION (arXiv 2409.18569) on rendered people before two cameras: targets from other pictures of a person, or one's own.

People of 48 x 24 pixels wear a code of colours and are filmed in four tracklets of eight pictures. A small
convolutional network trains on 200 of them for equal steps and crops: DINO, each picture a person of its own; CION with
the true people, in groups of two pictures and then four; CION where 30 % of the tracklets bear another person's name;
and random weights. Figures are mean average precision of finding people whom nothing is trained on before the other
camera. Rates of each arm are the best of the same two on other people, of seed 100.

The miner gets tracklets in random order, of which 10 % of the pictures show somebody else, and features of a network
that trained with the tracklets as people. Its thresholds are the best of a grid on seed 100; F1 is of pairs of pictures
that are said to show one person.
"""

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor, nn

from lightspan.backbones.vision import SmallConvNet
from lightspan.datamodules.images.views import MultiCrop, RandomViews
from lightspan.datamodules.loading.order import GroupSizes
from lightspan.datamodules.rendered.persons import Persons
from lightspan.estimators.dense_probes import CrossCameraRetrieval
from lightspan.estimators.identities import MinedIdentities, MineIdentities
from lightspan.features.features import Features
from lightspan.methods.distillation.cion import CION
from lightspan.nn.heads.dino_head import DINOHead
from lightspan.optim.schedules import WarmupCosineDecay

SEEDS, SEARCH = (0, 1, 2), 100
PEOPLE, JUDGED, BATCH, STEPS = 200, 100, 48, 300
RATES = (1e-3, 3e-3)
WRONG, MIXED = 0.3, 0.1
ARMS = ("random weights", "DINO", "CION", "CION, 30 % wrong names", "CION, tracklets as names")
CORES, WITHIN, ACROSS = (0.3, 0.6), (0.5, 0.65, 0.8, 0.9), (0.5, 0.65, 0.8, 0.9)


class Named(CION):
    """CION that is told who is who in the arm's own way: nobody, the data's labels, or tracklets."""

    def __init__(self, arm: str, *parts: Any, **settings: Any) -> None:
        super().__init__(*parts, **settings)
        self.arm = arm

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        names = {"DINO": -torch.ones_like(batch["label"]), "CION, tracklets as names": batch["tracklet"]}
        return super().training_step({**batch, "label": names.get(self.arm, batch["label"])}, batch_idx)


def people(arm: str, seed: int, steps: int) -> Persons:
    epochs = max(1, steps * BATCH // (PEOPLE * 32))
    crops = [
        RandomViews(count=2, size=24, scale=(0.5, 1.0), brightness=0.3, contrast=0.3),
        RandomViews(count=2, size=12, scale=(0.1, 0.4), brightness=0.3, contrast=0.3),
    ]
    return Persons(
        views=MultiCrop(crops),  # type: ignore[arg-type]
        groups=GroupSizes((2, 4), (0, max(1, epochs // 2))),
        wrong=WRONG if "wrong" in arm else 0.0,
        mixed=MIXED if "tracklets" in arm else 0.0,
        size=PEOPLE,
        val_size=JUDGED,
        test_size=JUDGED,
        batch_size=BATCH,
        draw_seed=seed,
        seed=seed,
    )


def trained(arm: str, rate: float, seed: int, steps: int) -> tuple[nn.Module, Persons]:
    data = people(arm, seed, steps)
    seed_everything(seed, verbose=False)
    method = Named(
        arm,
        SmallConvNet(in_chans=3, width=16, stages=4),
        DINOHead(128, 256, hidden=(256,), bottleneck=64),
        momentum=0.98,
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.04),
        lr_scheduler=partial(WarmupCosineDecay, final=0.01),
    )
    if arm == "random weights":
        data.setup()
    else:
        quiet_trainer(max_steps=steps, gradient_clip_val=3.0).fit(method, datamodule=data)
    return method.eval(), data


@torch.no_grad()
def encoded(method: Any, loader: Any) -> Features:
    names = ("identity", "camera", "tracklet")
    rows = [(method.features(batch), *(batch[name] for name in names)) for batch in loader]
    x, *fields = (torch.cat(column) for column in zip(*rows, strict=True))
    return Features(x, fields=dict(zip(names, fields, strict=True)))


def precision(method: Any, loader: Any) -> float:
    """Mean average precision across cameras, in per cent."""
    features = encoded(method, loader)
    return 100 * CrossCameraRetrieval().fit(features, features).scores["mean_average_precision"]


def searched(steps: int) -> dict[str, float]:
    """The rate of each arm, by people that no figure is taken on."""
    found = {}
    for arm in ARMS:
        rates = RATES[:1] if arm == "random weights" else RATES

        def score(rate: float, arm: str = arm) -> float:
            method, data = trained(arm, rate, SEARCH, steps)
            return precision(method, data.val_dataloader())

        found[arm] = max(rates, key=score)
    return found


def tracklets(method: Any, data: Persons, seed: int) -> Features:
    """Of the training pictures, with numbers of tracklets that say nothing of the person."""
    features = encoded(method, data.bank_dataloader())
    shuffled = torch.randperm(PEOPLE * 4, generator=torch.Generator().manual_seed(seed))
    return replace(features, fields=features.fields | {"tracklet": shuffled[features.fields["tracklet"]]})


def mined(features: Features, core: float, within: float, across: float) -> MinedIdentities:
    reach = PEOPLE * 4
    return MineIdentities(core, within, across, near=reach, far=reach, noisy=2.0, truth="identity").fit(features)


def compare(evidence, seeds=SEEDS, steps: int = STEPS) -> None:
    rates = searched(steps)
    of_tracklets = "CION, tracklets as names"
    features = tracklets(*trained(of_tracklets, rates[of_tracklets], SEARCH, steps), SEARCH)
    best = max(product(CORES, WITHIN, ACROSS), key=lambda levels: mined(features, *levels).stages[-1]["f1"])
    found: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    gained = {}
    for seed, arm in product(seeds, ARMS):
        method, data = trained(arm, rates[arm], seed, steps)
        found[arm][seed] = precision(method, data.test_dataloader())
        evidence.figure(f"mean average precision across cameras, {arm}", found[arm][seed], seed, "%")
        if arm == of_tracklets:
            stages = mined(tracklets(method, data, seed), *best).stages
            for stage in stages:
                evidence.figure(f"pairwise F1, {stage['stage']}", 100 * stage["f1"], seed, "%")
                evidence.figure(f"people, {stage['stage']}", stage["groups"], seed)
            gained[seed] = 100 * (stages[-1]["f1"] - stages[0]["f1"])
    said = ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items())
    evidence.note(
        f"{steps} steps of {BATCH} pictures in two crops of 24 pixels and two of 12. Chosen on seed {SEARCH}: rates of "
        f"{RATES}, {said}; levels of the miner {best} (in a tracklet, in a video, across)."
    )

    def gain(arm: str, over: str) -> dict[int, float]:
        return {seed: found[arm][seed] - found[over][seed] for seed in seeds}

    name = "mean average precision"
    evidence.claim(f"{name}, CION minus DINO", gain("CION", "DINO"), at_least=10.0, unit="points")
    evidence.claim(f"{name}, CION minus random weights", gain("CION", "random weights"), at_least=15.0, unit="points")
    wrong = "CION, 30 % wrong names"
    evidence.claim(f"{name}, {wrong} minus DINO", gain(wrong, "DINO"), at_least=0.0, unit="points")
    evidence.claim(f"{name}, CION minus {wrong}", gain("CION", wrong), at_least=0.0, unit="points")
    evidence.claim("pairwise F1, mined people minus tracklets", gained, at_least=10.0, unit="points")


def test_cion(evidence) -> None:
    compare(evidence)
