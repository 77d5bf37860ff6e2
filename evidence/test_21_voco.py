"""VoCo (arXiv 2402.17300) on drawn trunks, when four are labelled: against random weights, and with overlaps mixed up.

Trunks of 16 x 48 x 48 voxels with twelve organs, several of one grey, so that only their surroundings tell them apart.
The way down of a U-Net is pre-trained on 60 trunks without labels, on a grid of 3 x 3 base crops and four crops at
random places; then a U-Net starts from it, is fine-tuned on four labelled trunks, and labels 12 others. The score is
Dice, mean over organs and trunks. Arms, with equal steps: VoCo; VoCo whose overlaps are those of other crops of the
batch; random weights. Rates are searched on trunks that no figure is taken on: that of pre-training by the error in
place of VoCo, and for VoCo and random weights alike that of fine-tuning; floors and ceilings have those of VoCo.

Floor: overlaps mixed up; of the error in place the untrained network. Ceiling: a U-Net pre-trained on the labels of all
60, whose way down is kept; of the error in place the overlaps themselves. Gate: the error in place; of random weights
the Dice of the trunks that they are fine-tuned on.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from labelled_trunks import BATCH, LABELLED, TEST, UNLABELLED, supervised, tuned, way_down
from placed_crops import crops, places
from quiet import quiet_trainer
from torch import Tensor

from lightspan.backbones.dense import PooledMaps
from lightspan.methods.contrastive.voco import VoCo
from lightspan.nn.heads.projector import Projector
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH = (0, 1, 2), 100
STEPS, TUNING = 300, 150
RATES, TUNING_RATES = (1e-3, 3e-3, 1e-2), (1e-2, 3e-2, 1e-1)
PRETRAINED = ("VoCo", "overlaps mixed up", "true labels")


class MixedUp(VoCo):
    """The overlaps of each crop are those of another crop of the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        overlap_NK = batch["overlap"].flatten(0, 1)
        order = torch.randperm(len(overlap_NK), generator=torch.Generator().manual_seed(self.global_step))
        return super().training_step(batch | {"overlap": overlap_NK[order].view_as(batch["overlap"])}, batch_idx)


@cache
def pretrained(arm: str, rate: float, seed: int, steps: int) -> tuple[Mapping[str, Tensor], dict[str, float]]:
    """Weights of the way down, and of a method the figures of its pretext."""
    if arm == "true labels":
        names = way_down().state_dict()
        return {name: tensor for name, tensor in supervised(rate, seed, steps).items() if name in names}, {}
    method = built(arm, rate, seed)
    if steps:
        quiet_trainer(max_steps=steps, gradient_clip_val=3.0).fit(method, datamodule=crops(seed))
    return method.backbone.encoder.state_dict(), places(method.eval().student, seed)


def built(arm: str, rate: float, seed: int) -> VoCo:
    torch.manual_seed(seed)
    network = PooledMaps(way_down())
    return (MixedUp if arm == "overlaps mixed up" else VoCo)(
        network,
        Projector(network.num_features, [256, 256], 256),
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.01),
        lr_scheduler=partial(WarmupCosine, final=0.0),
    )


def run(arm: str, rates: tuple[float, float], seed: int, steps: int, tuning: int) -> dict[str, float]:
    """Dice of other trunks and of those it is tuned on, before and after; the figures of the pretext."""
    known, pretext = pretrained(arm, rates[0], seed, steps) if arm in PRETRAINED else ({}, {})
    return tuned(known, rates[1], seed, tuning) | pretext


def compare(evidence: Any, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS, tuning: int = TUNING) -> None:
    early = evidence.search(
        {"VoCo, before tuning": lambda rate: -pretrained("VoCo", rate, SEARCH, steps)[1]["error"]}, RATES,
        what="rate of pre-training", seed=SEARCH,
    )  # fmt: skip
    rate = early["VoCo, before tuning"]
    before = {"VoCo": rate, "overlaps mixed up": rate, "true labels": 3e-3, "random weights": 0.0}
    after = evidence.search(
        {
            arm: lambda rate, arm=arm: run(arm, (before[arm], rate), SEARCH, steps, tuning)["dice"]
            for arm in ("VoCo", "random weights")
        },
        TUNING_RATES, what="rate of fine-tuning", seed=SEARCH,
    )  # fmt: skip
    after |= dict.fromkeys(("overlaps mixed up", "true labels"), after["VoCo"])
    runs = {arm: {s: run(arm, (before[arm], after[arm]), s, steps, tuning) for s in seeds} for arm in before}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            evidence.figure(f"Dice, {arm}", found["dice"], seed, "%")
    untrained = {seed: places(built("VoCo", 1e-3, seed).eval().student, seed) for seed in seeds}
    learned = {seed: found["error"] for seed, found in runs["VoCo"].items()}
    guessed = {seed: found["error"] for seed, found in untrained.items()}
    evidence.gate("VoCo", learned, guessed, by=0.2, lower_is_better=True)
    own = {what: {s: found[what] for s, found in runs["random weights"].items()} for what in ("own", "own before")}
    evidence.gate("random weights", own["own"], own["own before"], by=20, unit="points")
    evidence.note(
        f"{UNLABELLED} trunks without labels, {LABELLED} with, {TEST} to test; {steps} steps of {BATCH} trunks before, "
        f"{tuning} steps of 2 on labels. Rates on seed {SEARCH}, whose trunks are others."
    )

    def gain(arm: str) -> dict[int, float]:
        return {seed: runs[arm][seed]["dice"] - runs["random weights"][seed]["dice"] for seed in seeds}

    arms = ("VoCo", "random weights")
    evidence.claim(
        "Dice with four labelled trunks, VoCo minus random weights", gain("VoCo"), at_least=5.0, unit="points",
        floor=gain("overlaps mixed up"), ceiling=gain("true labels"), arms=arms,
    )  # fmt: skip
    evidence.claim(
        "Dice with four labelled trunks, overlaps mixed up minus random weights", gain("overlaps mixed up"),
        at_most=1.0, unit="points", floor=gain("VoCo"), ceiling=dict.fromkeys(seeds, 0.0), arms=arms,
    )  # fmt: skip
    evidence.claim(
        "error in place of held-out crops, VoCo over the middle",
        learned, at_most=1 / 3, floor=guessed,
        ceiling={seed: found["least"] for seed, found in untrained.items()}, arms=("VoCo",),
    )  # fmt: skip


def test_voco(evidence: Any) -> None:
    compare(evidence)
