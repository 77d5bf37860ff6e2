"""Swin3D (arXiv 2304.06906): pre-trained on clean rooms, and tuned on four that a bad scanner sees.

Rooms with real furniture, scanned by frames from random places: clouds with colours and 14 classes, in voxels of
25 cm. A small Swin3D (three stages, widths 16 to 64, windows of four voxels) learns the classes of 48 clean rooms, and
then those of four rooms as a bad scanner sees them; rare classes count for more. The score is the mean intersection
over union of the points of 16 other rooms of the same catalogue of furniture. Arms with equal steps of fine-tuning: its
encoder, as in the paper, and random weights. Floor: an encoder that learned the classes of other points of its room.
Ceiling: one that learned 24 noisy rooms, the four among them.
Rates are searched on rooms that no figure is taken on; floor and ceiling have those of the first arm.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from scanned_rooms import (
    BATCH,
    CLEAN,
    NOISY,
    NOISY_TEST,
    RATES,
    SEARCH,
    STEPS,
    Cloud,
    pool,
    rooms,
    score,
    segmenter,
    trained,
)
from torch import Tensor

NEEDS = ("/usr/share/sweethome3d/furniture", "trimesh")
SEEDS = (0, 1, 2)
LABELLED, TUNING = 4, 45
BLOCKS = 0.1  # of the rate, as in the code
PRETRAINED, SCRATCH, SHUFFLED, SAME = "pre-trained", "random weights", "pre-trained on other classes", "noisy rooms"


def labelled(seed: int) -> list[Cloud]:
    """The noisy rooms of which the classes are known."""
    own, _ = rooms(pool(seed), True)
    return [own[row] for row in np.random.default_rng(seed).choice(len(own), LABELLED, replace=False)]


def shuffled(clouds: list[Cloud], seed: int) -> list[Cloud]:
    """Each point with the class of another of its room."""
    draws = torch.Generator().manual_seed(seed)
    return [
        cloud | {"classes": cloud["classes"][torch.randperm(len(cloud["classes"]), generator=draws)]}
        for cloud in clouds
    ]


@cache
def learned(arm: str, rate: float, seed: int, steps: int) -> tuple[Mapping[str, Tensor], float]:
    """Weights of the encoder, and the score on other rooms."""
    own, test = rooms(pool(seed), arm == SAME)
    own = shuffled(own, seed) if arm == SHUFFLED else own
    method = trained(segmenter(rate, seed, own), own, steps, seed)
    return method.backbone.network.encoder.state_dict(), score(method, test)


def tuned(arm: str, rates: Mapping[str, float], rate: float, seed: int, steps: int, tuning: int) -> dict[str, float]:
    """Scores on other noisy rooms, and on those it is tuned on, before and after."""
    own = labelled(seed)
    method = segmenter(rate, seed, own, blocks=BLOCKS if arm != SCRATCH else 1.0)
    if arm != SCRATCH:
        method.backbone.network.encoder.load_state_dict(learned(arm, rates[arm], seed, steps)[0])
    before = score(method.eval(), own)
    trained(method.train(), own, tuning, seed)
    return {"iou": score(method, rooms(pool(seed), True)[1]), "own": score(method, own), "own before": before}


def compare(evidence: Any, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS, tuning: int = TUNING) -> None:
    early = evidence.search(
        {"clean rooms": lambda rate: learned(PRETRAINED, rate, SEARCH, steps)[1]}, RATES,
        what="rate of learning rooms", seed=SEARCH,
    )  # fmt: skip
    rates = dict.fromkeys((PRETRAINED, SHUFFLED, SAME), early["clean rooms"])
    after = evidence.search(
        {arm: partial(lambda arm, rate: tuned(arm, rates, rate, SEARCH, steps, tuning)["iou"], arm)
         for arm in (PRETRAINED, SCRATCH)},
        RATES, what="rate of fine-tuning", seed=SEARCH,
    )  # fmt: skip
    after |= dict.fromkeys((SHUFFLED, SAME), after[PRETRAINED])
    runs = {arm: {s: tuned(arm, rates, after[arm], s, steps, tuning) for s in seeds} for arm in after}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            evidence.figure(f"IoU of noisy rooms, {arm}", found["iou"], seed, "%")
    for arm in (PRETRAINED, SCRATCH):
        own = {what: {s: found[what] for s, found in runs[arm].items()} for what in ("own", "own before")}
        evidence.gate(arm, own["own"], own["own before"], by=10, unit="points")
    evidence.note(
        f"{CLEAN} clean rooms, {LABELLED} of {NOISY} noisy ones, {NOISY_TEST} to test; {steps} and then {tuning} steps "
        f"of {BATCH} rooms. Rates on seed {SEARCH}, whose rooms are others; other seeds share rooms, and draw their "
        "own four."
    )

    def minus(arm: str, other: str) -> dict[int, float]:
        return {seed: runs[arm][seed]["iou"] - runs[other][seed]["iou"] for seed in seeds}

    evidence.claim(
        "IoU with four noisy rooms, pre-trained minus random weights", minus(PRETRAINED, SCRATCH), at_least=5.0,
        unit="points", floor=minus(SHUFFLED, SCRATCH), ceiling=minus(SAME, SCRATCH), arms=(PRETRAINED, SCRATCH),
    )  # fmt: skip


def test_swin3d(evidence: Any) -> None:
    compare(evidence)
