"""Gaussian2Scene (arXiv 2506.08777): Gaussians drawn into posed pictures, after masked modelling of rooms.

Rooms of real furniture, seen by six frames of 32 x 32 pixels. A transformer on 64 groups of 8 of a room's 1,024 points
is pre-trained on 64 rooms with two views each. A linear probe of the frozen features of the groups near a point, and of
its place beside the nearest, learns from twelve of them to name the kind of each point; the score is the mean
intersection over union in other rooms of the same catalogue of furniture. Arms with equal steps: both stages; the first
stage alone, which is masked modelling of points and pictures after PiMAE; random weights. Floor: random weights.
Ceiling: an encoder that learned the labels of all 64 rooms, rare kinds counting for more, in as many steps.
The guess of hidden points is judged by its squared Chamfer distance in other rooms: at the end over that before the
second stage, of which the floor is the untrained network; and that of all Gaussians' centres from the points, with the
loss of their positions over that without. The ceiling of both is an exact guess.
Rates are searched on rooms that no figure is taken on.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from labelled_rooms import BATCH, UNLABELLED, Room, in_order, mean_iou, part, rooms, still, trained
from lightning import Callback
from own_loss import own_loss
from rare_classes import rare_cross_entropy, rarity
from torch import Tensor, nn

from lightspan.backbones.point_vit import PointViT
from lightspan.backbones.vit import vit
from lightspan.datamodules.points.batch import PosedPointsBatch
from lightspan.datamodules.points.furnished import CLASSES
from lightspan.datamodules.points.posed import PosedSceneSamples
from lightspan.evaluation.probes.linear_probe import fit_linear_probe
from lightspan.methods.masked.gaussian2scene import Gaussian2Scene
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.decoders.point_decoder import PointDecoder
from lightspan.nn.points.interpolation import interpolated
from lightspan.nn.sequences.joint_encoder import JointEncoder
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

NEEDS = ("/usr/share/sweethome3d/furniture", "trimesh")
SEEDS, SEARCH = (0, 1, 2), 100
LABELLED, TEST, POINTS = 12, 24, 1024
GROUPS, SIZE = 64, 8
STEPS, DRAW_FROM = 350, 0.7
RATES, PENALTIES = (5e-4, 1e-3, 2e-3), (1.0, 10.0, 100.0)
BOTH, FIRST, ADRIFT = "both stages", "first stage alone", "without the loss of positions"
SCRATCH, ALL = "random weights", "all labels"


def training(seed: int, count: int = UNLABELLED) -> PosedSceneSamples:
    """The first rooms."""
    return part(rooms(seed, UNLABELLED + TEST, 2, POINTS), 0, count)


def unseen(seed: int) -> list[Room]:
    """Batches of rooms that nothing is learned from."""
    return in_order(part(rooms(seed, UNLABELLED + TEST, 2, POINTS), UNLABELLED, UNLABELLED + TEST))


def adamw(rate: float) -> dict[str, Any]:
    return {
        "optimizer": partial(torch.optim.AdamW, lr=rate, weight_decay=0.05),
        "lr_scheduler": partial(WarmupCosine, warmup=0.1, final=0.0),
    }


def points_encoder() -> PointViT:
    return PointViT(GROUPS, SIZE, width=96, depth=4, heads=4, drop_path=0.0, point_widths=(32, 64, 96))


def built(arm: str, rate: float, seed: int) -> Any:
    torch.manual_seed(seed)
    if arm in (SCRATCH, ALL):
        known = still(training(seed))
        weight_K = rarity((known.sample(at, 0)["classes"] for at in range(UNLABELLED)), len(CLASSES))
        return GroupSegmenter(weight_K, **adamw(rate))
    return Gaussian2Scene(
        points_encoder(),
        vit(width=96, depth=2, heads=4, img_size=32, patch_size=8, class_token=False),
        JointEncoder(96, depth=2, heads=4),
        PointDecoder(96, depth=2, heads=4, drop_path=0.0),
        MaskDecoder(96, width=64, depth=1, heads=4),
        draw_from=1.0 if arm == FIRST else DRAW_FROM,
        size=0.15,
        picture_weight=5.0,
        position_weight=0.0 if arm == ADRIFT else 1.0,
        **adamw(rate),
    )


def near_groups(backbone: PointViT, batch: Room) -> Tensor:
    """Of each point what the groups near it have, and its place beside the nearest, [B P D+3]."""
    groups = backbone.grouped(batch["xyz"], batch["offsets"])
    xyz_BP3 = batch["xyz"].unflatten(0, (len(batch["offsets"]) - 1, -1))
    near_BPD = interpolated(backbone.tokens(groups), groups.centre_BG3, xyz_BP3)
    beside_BP3 = xyz_BP3 - interpolated(groups.centre_BG3, groups.centre_BG3, xyz_BP3, nearest=1)
    return torch.cat([near_BPD, beside_BP3], dim=2)


class GroupSegmenter(Method):
    """A class for each point, of the tokens of the groups near it and its place beside the nearest of them.

    Args:
        weight_K: of the classes in the loss.
    """

    batch_type = PosedPointsBatch

    def __init__(self, weight_K: Tensor, **optimization: Any) -> None:
        super().__init__(**optimization)
        self.backbone, self.weight_K = points_encoder(), weight_K
        self.head = nn.Sequential(nn.Linear(96 + 3, 96), nn.LayerNorm(96), nn.ReLU(), nn.Linear(96, len(CLASSES)))

    def forward(self, batch: Any) -> Tensor:
        """Logits [N K] of clouds of equally many points."""
        return self.head(near_groups(self.backbone, batch)).flatten(0, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = rare_cross_entropy(self(batch), batch["classes"], self.weight_K)
        self.log_training({"train/loss": loss})
        return loss


class Before(Callback):
    """Keeps the weights with which the second stage begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, module: Any, *about: Any) -> None:
        if trainer.global_step == self.step:
            self.weights = {name: value.clone() for name, value in module.state_dict().items()}


@cache
def learned(arm: str, rate: float, seed: int, steps: int) -> tuple[Any, dict[str, Tensor]]:
    """A trained method, and the weights with which its second stage began."""
    before = Before(round(DRAW_FROM * steps))
    model = trained(built(arm, rate, seed), training(seed), steps, seed, before)
    return model, before.weights


@torch.no_grad()
def losses(model: Any, batches: Sequence[Room]) -> dict[str, float]:
    """Each, of both stages, the mean over batches."""
    found = [model.eval().losses(batch, 0, True) for batch in batches]
    return {name: float(np.mean([float(one[name]) for one in found])) for name in found[0]}


@torch.no_grad()
def point_features(backbone: PointViT, batches: Sequence[Room]) -> tuple[Tensor, Tensor]:
    """(those of the groups near each point and its place beside the nearest, classes) of clouds of as many points."""
    rows, classes = list[Tensor](), list[Tensor]()
    for batch in batches:
        rows.append(near_groups(backbone.eval(), batch).flatten(0, 1))
        classes.append(batch["classes"])
    return torch.cat(rows), torch.cat(classes)


@cache
def read(arm: str, rate: float, penalty: float, seed: int, steps: int) -> float:
    """Mean intersection over union of all points of other rooms together, as a linear probe tells them, in per cent."""
    backbone = (built(SCRATCH, 1.0, seed) if arm == SCRATCH else learned(arm, rate, seed, steps)[0]).backbone
    known = point_features(backbone, in_order(training(seed), LABELLED))
    rows, truth = point_features(backbone, unseen(seed))
    weight_DC, bias_C = fit_linear_probe(*known, penalty)
    return mean_iou([((rows.to(weight_DC.dtype) @ weight_DC + bias_C).argmax(dim=1), truth)])


def compare(evidence: Any, seeds: Sequence[int] = SEEDS, steps: int = STEPS) -> None:
    held = unseen(SEARCH)
    early = evidence.search(
        {
            f"{arm}, own training": lambda rate, arm=arm: -losses(learned(arm, rate, SEARCH, steps)[0], held)["point"]
            for arm in (BOTH, FIRST)
        },
        RATES, what="rate of pre-training", seed=SEARCH,
    )  # fmt: skip
    rates = {arm: early[f"{arm}, own training"] for arm in (BOTH, FIRST)}
    rates |= {ADRIFT: rates[BOTH], ALL: 2e-3, SCRATCH: 0.0}
    penalties = evidence.search(
        {
            arm: lambda penalty, arm=arm: read(arm, rates[arm], penalty, SEARCH, steps)
            for arm in (BOTH, FIRST, SCRATCH, ALL)
        },
        PENALTIES, what="penalty of the probe", seed=SEARCH,
    )  # fmt: skip
    runs = {arm: {s: read(arm, rates[arm], penalty, s, steps) for s in seeds} for arm, penalty in penalties.items()}
    test = {s: unseen(s) for s in seeds}
    ends = {arm: {s: losses(learned(arm, rates[arm], s, steps)[0], test[s]) for s in seeds}
            for arm in (BOTH, FIRST, ADRIFT)}  # fmt: skip
    ends["untrained"] = {s: losses(built(BOTH, 1.0, s), test[s]) for s in seeds}
    ends["before the second stage"] = {}
    for s in seeds:
        halfway = built(BOTH, 1.0, s)
        halfway.load_state_dict(learned(BOTH, rates[BOTH], s, steps)[1])
        ends["before the second stage"][s] = losses(halfway, test[s])
    for arm, of_seed in runs.items():
        for seed, result in of_seed.items():
            evidence.figure(f"mean intersection over union of kinds, {arm}", result, seed, "%")
    for arm, of_seed in ends.items():
        for seed, result in of_seed.items():
            for name, value in result.items():
                evidence.figure(f"{name} loss in unseen rooms, {arm}", value, seed)
    for arm in (BOTH, FIRST, ADRIFT):
        make = {s: partial(built, arm, 1.0, s) for s in seeds}
        pair = [
            {s: own_loss(make[s], weights(s).state_dict(), test[s]) for s in seeds}
            for weights in (lambda s, arm=arm: learned(arm, rates[arm], s, steps)[0], lambda s, make=make: make[s]())
        ]
        evidence.gate(arm, *pair, by=0.2, lower_is_better=True)
    evidence.note(
        f"{UNLABELLED} rooms, {LABELLED} of them with labels, {TEST} to test; {steps} steps, the last "
        f"{100 - round(100 * DRAW_FROM)} % of which draw Gaussians, of {BATCH} rooms. Rates and penalties on "
        f"seed {SEARCH}, whose rooms are others."
    )

    def minus(arm: str, other: str) -> dict[int, float]:
        return {s: runs[arm][s] - runs[other][s] for s in seeds}

    def over(name: str, arm: str, other: str) -> dict[int, float]:
        return {s: ends[arm][s][name] / ends[other][s][name] for s in seeds}

    for other, margin in ((SCRATCH, 5.0), (FIRST, 1.5)):
        evidence.claim(
            f"mean intersection over union of kinds, {BOTH} minus {other}", minus(BOTH, other), at_least=margin,
            unit="points", arms=(BOTH,) if other == SCRATCH else (BOTH, other),  # random weights learn nothing
            floor=minus(SCRATCH, other), ceiling=minus(ALL, other),
        )  # fmt: skip
    exact = dict.fromkeys(seeds, 0.0)
    evidence.claim(
        "Chamfer distance of hidden points, both stages over before the second stage",
        over("point", BOTH, "before the second stage"), at_most=0.98, arms=(BOTH,),
        floor=over("point", "untrained", "before the second stage"), ceiling=exact,
    )  # fmt: skip
    evidence.claim(
        f"Chamfer distance of Gaussians from points, {BOTH} over {ADRIFT}", over("position", BOTH, ADRIFT),
        at_most=1 / 1.1, arms=(ADRIFT,), floor=over("position", "untrained", ADRIFT), ceiling=exact,
    )  # fmt: skip


def test_gaussian2scene(evidence: Any) -> None:
    compare(evidence)
