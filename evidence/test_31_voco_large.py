"""VoCo-L (arXiv 2410.09890) on drawn trunks, when four are labelled: against random weights, and against VoCo.

Trunks, crops and the tuning are those of the evidence on VoCo. The way down of a U-Net is pre-trained on 60 trunks
without labels; then a U-Net starts from it, is fine-tuned on four labelled trunks, and labels 12 others. The score is
Dice, mean over organs and trunks. Arms, with equal steps: VoCo-L, with a second head and comparisons across trunks;
VoCo; random weights. Rates are searched on trunks that no figure is taken on: those of pre-training by the error in
place, and then those of fine-tuning, among the same for all; the ceiling has that of VoCo-L.

Floor: random weights; of the error in place the untrained network. Ceiling: a U-Net pre-trained on the labels of all
60, whose way down is kept; of the error in place the overlaps themselves. Gate: the error in place.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from labelled_trunks import BATCH, LABELLED, TEST, UNLABELLED, supervised, tuned, way_down
from placed_crops import crops, places
from quiet import quiet_trainer
from torch import Tensor, nn

from lightspan.backbones.dense import PooledMaps
from lightspan.methods.contrastive.voco import VoCo
from lightspan.methods.contrastive.voco_large import VoCoLarge
from lightspan.nn.heads.projector import Projector
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH = (0, 1, 2), 100
STEPS, TUNING = 250, 120
RATES, TUNING_RATES = (1e-3, 3e-3, 1e-2), (1e-2, 3e-2, 1e-1)
LARGE, PLAIN, NONE, LABELS = "VoCo-L", "VoCo", "random weights", "true labels"


def built(arm: str, rate: float, seed: int) -> Any:
    torch.manual_seed(seed)
    network = PooledMaps(way_down())
    return (VoCoLarge if arm == LARGE else VoCo)(
        network,
        Projector(network.num_features, [256, 256], 256),
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.01),
        lr_scheduler=partial(WarmupCosine, final=0.0),
    )


def told(method: Any, seed: int) -> dict[str, float]:
    """How well places are."""
    method.eval()
    return places(nn.Sequential(method.backbone, method.projector), seed)


@cache
def pretrained(arm: str, rate: float, seed: int, steps: int) -> tuple[Mapping[str, Tensor], dict[str, float]]:
    """Weights of the way down, and of a method the figures of its pretext."""
    if arm == LABELS:
        names = way_down().state_dict()
        return {name: tensor for name, tensor in supervised(rate, seed, steps).items() if name in names}, {}
    method = built(arm, rate, seed)
    quiet_trainer(max_steps=steps, gradient_clip_val=3.0).fit(method, datamodule=crops(seed))
    return method.backbone.encoder.state_dict(), told(method, seed)


@cache
def run(arm: str, rate: float, tuning_rate: float, seed: int, steps: int, tuning: int) -> dict[str, float]:
    """Dice of other trunks, and the figures of the pretext."""
    known, pretext = ({}, {}) if arm == NONE else pretrained(arm, rate, seed, steps)
    return tuned(known, tuning_rate, seed, tuning) | pretext


def compare(evidence: Any, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS, tuning: int = TUNING) -> None:
    early = evidence.search(
        {f"{arm}, before tuning": partial(lambda arm, rate: -told_by(arm, rate, steps), arm) for arm in (LARGE, PLAIN)},
        RATES, what="rate of pre-training", seed=SEARCH,
    )  # fmt: skip
    before = {arm: early[f"{arm}, before tuning"] for arm in (LARGE, PLAIN)} | {LABELS: 3e-3, NONE: 0.0}
    after = evidence.search(
        {
            arm: partial(lambda arm, rate: run(arm, before[arm], rate, SEARCH, steps, tuning)["dice"], arm)
            for arm in (LARGE, PLAIN, NONE)
        },
        TUNING_RATES, what="rate of fine-tuning", seed=SEARCH,
    )  # fmt: skip
    after |= {LABELS: after[LARGE]}
    runs = {arm: {s: run(arm, before[arm], after[arm], s, steps, tuning) for s in seeds} for arm in before}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            evidence.figure(f"Dice, {arm}", found["dice"], seed, "%")
    untrained = {arm: {s: told(built(arm, 1e-3, s), s) for s in seeds} for arm in (LARGE, PLAIN)}
    learned = {arm: {s: found["error"] for s, found in runs[arm].items()} for arm in (LARGE, PLAIN)}
    for arm, before_training in untrained.items():
        guessed = {s: found["error"] for s, found in before_training.items()}
        evidence.gate(arm, learned[arm], guessed, by=0.2, lower_is_better=True)
    own = {what: {s: found[what] for s, found in runs[NONE].items()} for what in ("own", "own before")}
    evidence.gate(NONE, own["own"], own["own before"], by=20, unit="points")
    evidence.note(
        f"{UNLABELLED} trunks without labels, {LABELLED} with, {TEST} to test; {steps} steps of {BATCH} trunks before, "
        f"{tuning} steps of 2 on labels. Rates on seed {SEARCH}, whose trunks are others; rates of pre-training by the "
        "error in place."
    )

    def minus(arm: str, other: str) -> dict[int, float]:
        return {s: runs[arm][s]["dice"] - runs[other][s]["dice"] for s in seeds}

    for other, margin in ((NONE, 5.0), (PLAIN, -1.0)):
        evidence.claim(
            f"Dice with four labelled trunks, {LARGE} minus {other}", minus(LARGE, other), at_least=margin,
            unit="points", floor=minus(NONE, other), ceiling=minus(LABELS, other), arms=(LARGE, other),
        )  # fmt: skip
    evidence.claim(
        "error in place of held-out crops, VoCo-L over the middle", learned[LARGE], at_most=0.5,
        floor={s: found["error"] for s, found in untrained[LARGE].items()},
        ceiling={s: found["least"] for s, found in untrained[LARGE].items()}, arms=(LARGE,),
    )  # fmt: skip


def told_by(arm: str, rate: float, steps: int) -> float:
    """The error in place on the search seed."""
    return pretrained(arm, rate, SEARCH, steps)[1]["error"]


def test_voco_large(evidence: Any) -> None:
    compare(evidence)
