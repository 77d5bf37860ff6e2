"""Swin3D's encoding (arXiv 2304.06906): tables for places and colours against tables for places alone.

Clean scans of rooms with real furniture: clouds with colours and 14 classes, in voxels of 25 cm. A small Swin3D (three
stages, widths 16 to 64, windows of four voxels) learns the classes of 48 rooms, and is judged by the mean intersection
over union of the points of 12 others of the same catalogue; rare classes count for more in learning. Arms with equal
steps, and rates searched alike: tables for places and colours; tables for places alone, where colours enter as inputs
all the same. Floor: the untrained network. Ceiling: colours that tell the class.
Rates are searched on rooms that no figure is taken on; the ceiling has that of the first arm.
"""

from functools import cache, partial
from typing import Any

import torch
from scanned_rooms import CLEAN, CLEAN_TEST, RATES, SEARCH, STEPS, Cloud, pool, rooms, score, segmenter, trained

from lightspan.datamodules.points.furnished import CLASSES

NEEDS = ("/usr/share/sweethome3d/furniture", "trimesh")
SEEDS = (0, 1, 2)
BOTH, PLACES, TOLD = "places and colours", "places alone", "colours that tell the class"


def told(clouds: list[Cloud]) -> list[Cloud]:
    """With a colour for each class."""
    palette = torch.rand(len(CLASSES), 3, generator=torch.Generator().manual_seed(0))
    return [cloud | {"colour": palette[cloud["classes"].clamp_min(0)]} for cloud in clouds]


@cache
def learned(arm: str, rate: float, seed: int, steps: int) -> float:
    """The score on other rooms; with steps=0 untrained."""
    own, test = (told(part) if arm == TOLD else part for part in rooms(pool(seed), False))
    method = trained(segmenter(rate, seed, own, encoded=0 if arm == PLACES else 1), own, steps, seed)
    return score(method, test)


def compare(evidence: Any, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS) -> None:
    rates = evidence.search(
        {arm: partial(lambda arm, rate: learned(arm, rate, SEARCH, steps), arm) for arm in (BOTH, PLACES)}, RATES,
        what="rate of learning rooms", seed=SEARCH,
    )  # fmt: skip
    rates |= {TOLD: rates[BOTH]}
    found = {arm: {s: learned(arm, rate, s, steps) for s in seeds} for arm, rate in rates.items()}
    untrained = {s: learned(BOTH, 1e-3, s, 0) for s in seeds}
    for arm, of_seed in found.items():
        for seed, value in of_seed.items():
            evidence.figure(f"IoU of clean rooms, {arm}", value, seed, "%")
    for arm in (BOTH, PLACES):
        evidence.gate(arm, found[arm], untrained, by=10, unit="points")
    evidence.note(
        f"{CLEAN} rooms to learn from, {CLEAN_TEST} to test; {steps} steps. Rates on seed {SEARCH}, whose rooms are "
        "others; other seeds share rooms."
    )
    evidence.claim(
        "IoU of clean rooms, an encoding of places and colours minus one of places",
        {s: found[BOTH][s] - found[PLACES][s] for s in seeds}, at_least=1.0, unit="points",
        floor={s: untrained[s] - found[PLACES][s] for s in seeds},
        ceiling={s: found[TOLD][s] - found[PLACES][s] for s in seeds}, arms=(BOTH, PLACES),
    )  # fmt: skip


def test_encodings(evidence: Any) -> None:
    compare(evidence)
