"""Swin3D (arXiv 2304.06906): pre-trained on clean rooms and tuned on four noisy ones; an encoding that sees colours.

Rooms with real furniture, scanned by frames from random places: clouds with colours and 14 classes, in voxels of
25 cm. A small Swin3D (three stages, widths 16 to 64, windows of four voxels) learns the classes of 48 clean rooms, and
then those of four rooms as a bad scanner sees them; rare classes count for more. The score is the mean intersection
over union of the points of 16 other rooms of the same catalogue of furniture. Arms with equal steps of fine-tuning: its
encoder, as in the paper, and random weights. Floor: an encoder that learned the classes of other points of its room.
Ceiling: one that learned 24 noisy rooms, the four among them.
The encoding: the same network learns the clean rooms with tables for places and colours, and with tables for places
alone, where colours enter as inputs all the same; judged on 12 other clean rooms. Floor: the untrained network.
Ceiling: colours that tell the class.
Rates are searched on rooms that no figure is taken on; floors and ceilings have those of the first arm.
"""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from quiet import quiet_trainer
from rare_classes import RareSegmenter, rarity
from torch import Tensor
from torch.utils.data import DataLoader

from lightspan.backbones.swin3d import Swin3D, Swin3DEncoder
from lightspan.backbones.voxel_points import VoxelPoints
from lightspan.core.collate import collated
from lightspan.datamodules.points.batch import PointsBatch
from lightspan.datamodules.points.furnished import CLASSES, FurnishedRooms
from lightspan.datamodules.rendered.furnished import Sensor
from lightspan.nn.class_overlap import overlap
from lightspan.optim.groups import ParameterGroups, Rule
from lightspan.optim.schedules import WarmupCosine

NEEDS = ("/usr/share/sweethome3d/furniture", "trimesh")
SEEDS, SEARCH = (0, 1, 2), 100
CLEAN, NOISY, LABELLED, CLEAN_TEST, NOISY_TEST, BATCH = 48, 24, 4, 12, 16, 4
STEPS, TUNING = 300, 60
RATES, TUNING_RATES = (2e-3, 5e-3, 1e-2), (2e-3, 5e-3, 1e-2)
VOXEL = 0.25
SENSOR = Sensor(depth=0.02, missing=0.3, shift=0.25, grain=0.05, tilt=0.2)
BLOCKS = 0.1  # of the rate, as in the code
PRETRAINED, SCRATCH, SHUFFLED, SAME = "pre-trained", "random weights", "pre-trained on other classes", "noisy rooms"
BOTH, PLACES, TOLD = "places and colours", "places alone", "colours that tell the class"

Cloud = dict[str, Any]


@cache
def rooms(draw_seed: int, noisy: bool) -> tuple[list[Cloud], list[Cloud]]:
    """Clouds to train on, and others of the same furniture."""
    train, test = (NOISY, NOISY_TEST) if noisy else (CLEAN, CLEAN_TEST)
    data = FurnishedRooms(
        train + test + 1, frames=8, height=40, width=40, views=1, points=8192, voxel=VOXEL,
        sensor=SENSOR if noisy else None, draw_seed=draw_seed + noisy, val_size=1,
    )  # fmt: skip
    data.setup()
    names = ("xyz", "colour", "classes", "label", "index")
    bank = data.bank
    assert bank is not None
    clouds = [{name: room[name] for name in names} for room in (bank.sample(n, 0) for n in range(train + test))]
    return clouds[:train], clouds[train:]


def pool(seed: int) -> int:
    """The seed of the rooms' draws: those of the search are others."""
    return 1000 if seed == SEARCH else 0


def labelled(seed: int) -> list[Cloud]:
    """The noisy rooms of which the classes are known."""
    own, _ = rooms(pool(seed), True)
    return [own[row] for row in np.random.default_rng(seed).choice(len(own), LABELLED, replace=False)]


def told(clouds: list[Cloud]) -> list[Cloud]:
    """With a colour for each class."""
    palette = torch.rand(len(CLASSES), 3, generator=torch.Generator().manual_seed(0))
    return [cloud | {"colour": palette[cloud["classes"].clamp_min(0)]} for cloud in clouds]


def shuffled(clouds: list[Cloud], seed: int) -> list[Cloud]:
    """Each point with the class of another of its room."""
    draws = torch.Generator().manual_seed(seed)
    return [
        cloud | {"classes": cloud["classes"][torch.randperm(len(cloud["classes"]), generator=draws)]}
        for cloud in clouds
    ]


def segmenter(rate: float, seed: int, clouds: Sequence[Cloud], encoded: int = 1, blocks: float = 1.0) -> RareSegmenter:
    """For these clouds, of which rare classes count for more."""
    torch.manual_seed(seed)
    encoder = Swin3DEncoder(
        encoded=encoded, widths=(16, 32, 64), depths=(2, 2, 1), heads=(2, 4, 4), windows=(4, 4, 4), strides=(2, 2),
        drop_path=0.0,
    )  # fmt: skip

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=rate, weight_decay=1e-4)

    weights = rarity((cloud["classes"] for cloud in clouds), len(CLASSES))
    return RareSegmenter(
        VoxelPoints(Swin3D(encoder), VOXEL), weights, hidden=16, optimizer=optimizer,
        lr_scheduler=partial(WarmupCosine, warmup=0.05, final=0.0),
        groups=ParameterGroups(rules=[Rule(["*.blocks.*"], lr_scale=blocks)]),
    )  # fmt: skip


def trained(method: RareSegmenter, clouds: list[Cloud], steps: int, seed: int) -> RareSegmenter:
    """On some clouds a step; in evaluation mode."""
    draws = np.random.default_rng(seed)
    chosen = [draws.choice(len(clouds), BATCH, replace=False) for _ in range(steps)]
    batches: DataLoader[Any] = DataLoader(
        chosen,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=lambda rows: collated([clouds[row] for row in rows], PointsBatch),
    )
    if steps:
        quiet_trainer(max_steps=steps).fit(method, batches)
    return method.eval()


@torch.no_grad()
def score(method: RareSegmenter, clouds: list[Cloud]) -> float:
    """Mean intersection over union of all points together, in per cent."""
    counts = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
    for cloud in clouds:
        guess, truth = method(collated([cloud], PointsBatch)).argmax(dim=1), cloud["classes"]
        known = truth >= 0
        cells = truth[known] * len(CLASSES) + guess[known]
        counts += cells.bincount(minlength=len(CLASSES) ** 2).view_as(counts)
    return 100 * float(overlap(counts, first=0)["iou"])


@cache
def learned(arm: str, rate: float, seed: int, steps: int) -> tuple[Mapping[str, Tensor], float]:
    """Weights of the encoder, and the score on other rooms."""
    own, test = rooms(pool(seed), arm == SAME)
    own = shuffled(own, seed) if arm == SHUFFLED else told(own) if arm == TOLD else own
    test = told(test) if arm == TOLD else test
    method = trained(segmenter(rate, seed, own, encoded=0 if arm == PLACES else 1), own, steps, seed)
    return method.backbone.network.encoder.state_dict(), score(method, test)


def tuned(arm: str, rates: Mapping[str, float], rate: float, seed: int, steps: int, tuning: int) -> dict[str, float]:
    """Scores on other noisy rooms, and on those it is tuned on, before and after."""
    own = labelled(seed)
    method = segmenter(rate, seed, own, blocks=BLOCKS if arm != SCRATCH else 1.0)
    if arm != SCRATCH:
        known = BOTH if arm == PRETRAINED else arm
        method.backbone.network.encoder.load_state_dict(learned(known, rates[known], seed, steps)[0])
    before = score(method.eval(), own)
    trained(method.train(), own, tuning, seed)
    return {"iou": score(method, rooms(pool(seed), True)[1]), "own": score(method, own), "own before": before}


def compare(evidence: Any, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS, tuning: int = TUNING) -> None:
    rates = evidence.search(
        {arm: partial(lambda arm, rate: learned(arm, rate, SEARCH, steps)[1], arm) for arm in (BOTH, PLACES)},
        RATES, what="rate of learning rooms", seed=SEARCH,
    )  # fmt: skip
    rates |= dict.fromkeys((PRETRAINED, SHUFFLED, SAME, TOLD), rates[BOTH])
    after = evidence.search(
        {arm: partial(lambda arm, rate: tuned(arm, rates, rate, SEARCH, steps, tuning)["iou"], arm)
         for arm in (PRETRAINED, SCRATCH)},
        TUNING_RATES, what="rate of fine-tuning", seed=SEARCH,
    )  # fmt: skip
    after |= dict.fromkeys((SHUFFLED, SAME), after[PRETRAINED])
    runs = {arm: {s: tuned(arm, rates, after[arm], s, steps, tuning) for s in seeds} for arm in after}
    clean = {arm: {s: learned(arm, rates[arm], s, steps) for s in seeds} for arm in (BOTH, PLACES, TOLD)}
    untrained = {s: score(segmenter(1e-3, s, rooms(pool(s), False)[0]).eval(), rooms(pool(s), False)[1]) for s in seeds}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            evidence.figure(f"IoU of noisy rooms, {arm}", found["iou"], seed, "%")
    for arm, results in clean.items():
        for seed, (_, found) in results.items():
            evidence.figure(f"IoU of clean rooms, {arm}", found, seed, "%")
    for arm in (PRETRAINED, SCRATCH):
        own = {what: {s: found[what] for s, found in runs[arm].items()} for what in ("own", "own before")}
        evidence.gate(arm, own["own"], own["own before"], by=10, unit="points")
    for arm in (BOTH, PLACES):
        evidence.gate(arm, {s: found for s, (_, found) in clean[arm].items()}, untrained, by=10, unit="points")
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
    evidence.claim(
        "IoU of clean rooms, an encoding of places and colours minus one of places",
        {s: clean[BOTH][s][1] - clean[PLACES][s][1] for s in seeds}, at_least=1.0, unit="points",
        floor={s: untrained[s] - clean[PLACES][s][1] for s in seeds},
        ceiling={s: clean[TOLD][s][1] - clean[PLACES][s][1] for s in seeds}, arms=(BOTH, PLACES),
    )  # fmt: skip


def test_swin3d(evidence: Any) -> None:
    compare(evidence)
