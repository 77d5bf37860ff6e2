"""PonderV2 (arXiv 2310.08586): an encoder of points is pre-trained by rendering posed pictures, without labels.

Rooms of real furniture, seen by six frames of 32 x 32 pixels. A small sparse U-Net on voxels of 8 cm is pre-trained on
64 rooms, then fine-tuned on a few of them with labels to name the kind of each point, where rare kinds count for more,
and judged by the mean intersection over union in other rooms of the same catalogue of furniture. Arms with equal steps:
PonderV2; own colour, where the encoder sees as few points as there and a linear map guesses the colour that each came
with; scratch. Ceiling: an encoder that learned the labels of all 64 rooms in as many steps as the others took.
How well unseen rooms are rendered is told by the mean error of depths over that of always guessing the mean depth of
the training rooms; its floor is the network before any step, its ceiling exact depths.
Rates are searched on rooms that no figure is taken on.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from labelled_rooms import UNLABELLED, Room, in_order, mean_iou, part, rooms, still, trained
from lightning import seed_everything
from rare_classes import RareSegmenter, rarity
from torch import Tensor, nn

from lightspan.backbones.sparse_unet import SparseUNet
from lightspan.backbones.voxel_points import VoxelPoints
from lightspan.datamodules.points.furnished import CLASSES
from lightspan.datamodules.points.posed import PosedSceneSamples
from lightspan.methods.generative.ponder_v2 import PonderV2
from lightspan.nn.decoders.grid_unet import GridUNet
from lightspan.nn.signed_fields import SignedField
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

NEEDS = ("/usr/share/sweethome3d/furniture", "trimesh")
SEEDS, SEARCH = (0, 1, 2), 100
LABELLED, TEST = 4, 16
POINTS, KEEP, TUNED_POINTS = 4096, 0.2, 2048
STEPS, TUNING = 240, 100
RATES = (1e-3, 3e-3, 1e-2)


def training(seed: int, count: int = UNLABELLED, points: int = POINTS) -> PosedSceneSamples:
    """The first rooms."""
    return part(rooms(seed, UNLABELLED + TEST, 4, POINTS), 0, count, points)


def unseen(seed: int, points: int = POINTS) -> list[Room]:
    """Batches of rooms that nothing is learned from."""
    return in_order(part(rooms(seed, UNLABELLED + TEST, 4, POINTS), UNLABELLED, UNLABELLED + TEST, points))


def backbone() -> VoxelPoints:
    return VoxelPoints(SparseUNet(9, 16, (24, 32, 32, 24), (1, 1, 1, 1), 0.1), 0.08, ("colour", "normal"))


def adamw(rate: float) -> dict[str, Any]:
    return {
        "optimizer": partial(torch.optim.AdamW, lr=rate, weight_decay=0.01),
        "lr_scheduler": partial(WarmupCosine, warmup=0.1, final=0.0),
    }


def ponder(rate: float) -> PonderV2:
    volume, field = GridUNet(24, 32, (24, 32)), SignedField(16, 16, 32)
    return PonderV2(backbone(), volume, field, (12, 24, 24), KEEP, rays=32, pieces=24, finer=8, **adamw(rate))


class OwnColour(Method):
    """Guesses of each point the colour with which it comes."""

    def __init__(self, rate: float) -> None:
        super().__init__(**adamw(rate))
        self.backbone = backbone()
        self.head = nn.Linear(self.backbone.num_features, 3)

    def error(self, batch: Any) -> Tensor:
        guess = self.head(self.backbone(batch["xyz"], batch["offsets"], batch["colour"], batch["normal"]))
        return (guess - batch["colour"]).abs().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.error(batch)


@cache
def pretrained(arm: str, seed: int, rate: float, steps: int) -> Any:
    seed_everything(seed, verbose=False)
    if arm == "PonderV2":
        return trained(ponder(rate), training(seed), steps, seed)
    if arm == "all labels":
        return tuned(backbone(), seed, rate, UNLABELLED, steps)
    return trained(OwnColour(rate), training(seed, points=round(KEEP * POINTS)), steps, seed)


def tuned(start: VoxelPoints, seed: int, rate: float, count: int, steps: int) -> RareSegmenter:
    """All weights of a copy of the encoder, behind a new classifier, in whose loss rare classes count."""
    seed_everything(seed, verbose=False)
    samples = training(seed, count, TUNED_POINTS)
    known = still(samples)
    weights = rarity((known.sample(at, 0)["classes"] for at in range(count)), len(CLASSES))
    model = RareSegmenter(backbone(), weights, **adamw(rate))
    model.backbone.load_state_dict(start.state_dict())
    return trained(model, samples, steps, seed)


@torch.no_grad()
def overlap(model: RareSegmenter, batches: Sequence[Room]) -> float:
    return mean_iou([(model(batch).argmax(dim=1), batch["classes"]) for batch in batches])


@torch.no_grad()
def depth_error(model: PonderV2, batches: Sequence[Room]) -> float:
    """Metres."""
    return float(np.mean([float(model.losses(batch, 0)[1]) for batch in batches]))


def mean_depth_error(seed: int) -> float:
    """Metres, of the mean depth of the training rooms in the test rooms."""
    known = torch.cat([batch["depth"].flatten() for batch in in_order(training(seed))])
    test = torch.cat([batch["depth"].flatten() for batch in unseen(seed)])
    return float((test - known.mean()).abs().mean())


def compare(evidence: Any, seeds: Sequence[int] = SEEDS, steps: int = STEPS, tuning: int = TUNING) -> None:
    held, named_points = unseen(SEARCH), unseen(SEARCH, TUNED_POINTS)
    coloured = unseen(SEARCH, round(KEEP * POINTS))

    @torch.no_grad()
    def own_colour(rate: float) -> float:
        model = pretrained("own colour", SEARCH, rate, steps)
        return -float(np.mean([float(model.error(batch)) for batch in coloured]))

    early = evidence.search(
        {
            "PonderV2, before tuning": lambda rate: -depth_error(pretrained("PonderV2", SEARCH, rate, steps), held),
            "own colour, before tuning": own_colour,
        },
        RATES,
        what="rate of pre-training",
        seed=SEARCH,
    )
    blank = pretrained("PonderV2", SEARCH, 1.0, 0).backbone
    rates = {arm: early[f"{arm}, before tuning"] for arm in ("PonderV2", "own colour")} | {"all labels": 3e-3}
    starts = {arm: pretrained(arm, SEARCH, rates[arm], steps).backbone for arm in ("PonderV2", "own colour")}
    starts |= {"scratch": blank}
    tuning_rates = evidence.search(
        {
            arm: lambda rate, start=start: overlap(tuned(start, SEARCH, rate, LABELLED, tuning), named_points)
            for arm, start in starts.items()
        },
        RATES,
        what="rate of fine-tuning",
        seed=SEARCH,
    )
    tuning_rates |= {"all labels": tuning_rates["PonderV2"]}
    named: dict[str, dict[int, float]] = {arm: {} for arm in tuning_rates}
    error: dict[str, dict[int, float]] = {
        name: {} for name in ("PonderV2", "untrained", "training rooms", "mean depth")
    }
    colour: dict[str, dict[int, float]] = {name: {} for name in ("own colour", "untrained")}
    learned: dict[str, dict[int, float]] = {name: {} for name in ("scratch", "no step")}
    for seed in seeds:
        test, known = unseen(seed), in_order(training(seed, LABELLED, TUNED_POINTS))
        empty = pretrained("PonderV2", seed, 1.0, 0)
        whole = {arm: pretrained(arm, seed, rates[arm], steps) for arm in rates}
        error["PonderV2"][seed], error["untrained"][seed] = (depth_error(m, test) for m in (whole["PonderV2"], empty))
        error["training rooms"][seed] = depth_error(whole["PonderV2"], in_order(training(seed), TEST))
        error["mean depth"][seed] = mean_depth_error(seed)
        with torch.no_grad():
            for name, model in (
                ("own colour", whole["own colour"]),
                ("untrained", pretrained("own colour", seed, 1, 0)),
            ):
                few = unseen(seed, round(KEEP * POINTS))
                colour[name][seed] = float(np.mean([float(model.error(batch)) for batch in few]))
        for arm in named:
            start = whole.get(arm, empty)
            model = tuned(start.backbone, seed, tuning_rates[arm], LABELLED, tuning)
            named[arm][seed] = overlap(model, unseen(seed, TUNED_POINTS))
            if arm == "scratch":
                learned["scratch"][seed] = overlap(model, known)
                learned["no step"][seed] = overlap(tuned(start.backbone, seed, 1.0, LABELLED, 0), known)
    for arm, of_seed in named.items():
        for seed, value in of_seed.items():
            evidence.figure(f"mean intersection over union of kinds, {arm}", value, seed, "%")
    for name, of_seed in error.items():
        for seed, value in of_seed.items():
            evidence.figure(f"error of depths in unseen rooms, {name}", value, seed, "m")
    evidence.gate("PonderV2", error["PonderV2"], error["untrained"], by=0.2, unit="m", lower_is_better=True)
    evidence.gate("own colour", colour["own colour"], colour["untrained"], by=0.05, lower_is_better=True)
    evidence.gate("scratch", learned["scratch"], learned["no step"], by=10.0, unit="points")

    def less(arm: str, other: str) -> dict[int, float]:
        return {seed: named[arm][seed] - named[other][seed] for seed in seeds}

    for other, margin in (("scratch", 4.0), ("own colour", 2.0)):
        evidence.claim(
            f"mean intersection over union of kinds, PonderV2 minus {other}", less("PonderV2", other), at_least=margin,
            unit="points", arms=("PonderV2", other), floor=less(other, other), ceiling=less("all labels", other),
        )  # fmt: skip
    ratio = {name: {seed: of[seed] / error["mean depth"][seed] for seed in seeds} for name, of in error.items()}
    evidence.claim(
        "error of depths in unseen rooms, PonderV2 over the mean depth", ratio["PonderV2"], at_most=0.5,
        arms=("PonderV2",), floor=ratio["untrained"], ceiling=dict.fromkeys(seeds, 0.0),
    )  # fmt: skip


def test_ponderv2_on_furnished_rooms(evidence) -> None:
    compare(evidence)
