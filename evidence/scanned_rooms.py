"""Rooms of real furniture as scanners see them, and a small Swin3D that learns their classes."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from quiet import quiet_trainer
from rare_classes import RareSegmenter, rarity
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

SEARCH = 100
CLEAN, NOISY, CLEAN_TEST, NOISY_TEST, BATCH = 48, 24, 12, 16, 4
STEPS, RATES = 200, (2e-3, 5e-3, 1e-2)
VOXEL = 0.25
SENSOR = Sensor(depth=0.02, missing=0.3, shift=0.25, grain=0.05, tilt=0.2)

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
