"""Rooms of real furniture, few of them labelled, and how methods learn from them: for PonderV2 and Gaussian2Scene.

Shapes: N points.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from lightning import Callback
from quiet import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightspan.core.collate import collated
from lightspan.datamodules.points.batch import PosedPointsBatch
from lightspan.datamodules.points.furnished import CLASSES, FurnishedRooms
from lightspan.datamodules.points.posed import PosedSceneSamples, SceneMoves
from lightspan.nn.class_overlap import overlap

UNLABELLED, BATCH = 64, 4

Room = dict[str, Any]


@cache
def rooms(seed: int, count: int, views: int, points: int) -> PosedSceneSamples:
    """So many rooms with the same furniture, each seen by six frames of 32 x 32 pixels."""
    data = FurnishedRooms(
        rooms=count + 1, val_size=1, frames=6, height=32, width=32, views=views, points=points, draw_seed=seed,
        moves=SceneMoves(degrees=180, flip=0.5, scale=(0.8, 1.2)),
    )  # fmt: skip
    data.setup()
    assert data.train is not None
    return data.train


def part(samples: PosedSceneSamples, first: int, end: int, points: int | None = None) -> PosedSceneSamples:
    """Some of the rooms, with as many points as they have, or fewer."""
    return replace(samples, numbers=samples.numbers[first:end], points=points or samples.points)


def still(samples: PosedSceneSamples) -> PosedSceneSamples:
    """The rooms as they are."""
    return replace(samples, random=False, moves=None)


def in_order(samples: PosedSceneSamples, count: int | None = None) -> list[Room]:
    """Batches of the first rooms, or of all, as they are."""
    as_they_are = still(samples)
    return [
        collated([as_they_are.sample(at, 0) for at in range(first, first + BATCH)], PosedPointsBatch)
        for first in range(0, count or len(samples), BATCH)
    ]


def trained(model: Any, samples: PosedSceneSamples, steps: int, seed: int, *callbacks: Callback) -> Any:
    """On some rooms a step; in evaluation mode. With steps=0 untrained."""
    draws = np.random.default_rng(seed)
    chosen = [draws.choice(len(samples), BATCH, replace=False).tolist() for _ in range(steps)]

    def batch(step: int) -> Room:
        seeds = np.random.default_rng([seed, step]).integers(2**31, size=BATCH).tolist()
        return collated([samples.sample(at, s) for at, s in zip(chosen[step], seeds, strict=True)], PosedPointsBatch)

    if steps:
        batches = DataLoader([*range(steps)], batch_size=None, collate_fn=batch)
        quiet_trainer(max_steps=steps, gradient_clip_val=1.0, callbacks=[*callbacks]).fit(model, batches)
    return model.eval()


def mean_iou(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean intersection over union of all points together, in per cent.

    Args:
        pairs: guessed and true classes [N] each.
    """
    guess, truth = (torch.cat(column) for column in zip(*pairs, strict=True))
    count = len(CLASSES)
    cells = (truth * count + guess).bincount(minlength=count**2).view(count, count)
    return 100 * float(overlap(cells, first=0)["iou"])
