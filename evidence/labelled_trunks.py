"""Drawn trunks whose organs are known, and a U-Net that is tuned on a few of them: what VoCo and Volume Fusion share.

Trunks of 16 x 48 x 48 voxels with twelve organs, several of one grey, so that only their surroundings tell them apart.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from quiet import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightspan.backbones.dense import UNet, UNetEncoder
from lightspan.datamodules.volume.augment import VolumeAugmentation
from lightspan.datamodules.volume.phantoms import ORGANS, Phantoms
from lightspan.evaluation.dense.segmentation_scores import segmentation_scores
from lightspan.methods.supervised.segmenter import Segmenter
from lightspan.optim.schedules import WarmupCosine

UNLABELLED, LABELLED, TEST, BATCH = 60, 4, 12, 4
WIDTH, LEVELS = 8, 3


def network() -> UNet:
    return UNet(1, WIDTH, LEVELS, axes=3)


def way_down() -> UNetEncoder:
    return UNetEncoder(1, WIDTH, LEVELS, axes=3)


def trunks(seed: int, augment: VolumeAugmentation | None = None, **crops: Any) -> Phantoms:
    """Of the last patients, the validation set, some are labelled and the others test."""
    data = Phantoms(
        UNLABELLED + LABELLED + TEST, 16, 48, 0.0, noise=0.06, draw_seed=seed, val_size=LABELLED + TEST,
        batch_size=BATCH, augment=augment, seed=seed, **{"size": (16, 48, 48)} | crops,
    )  # fmt: skip
    data.setup()
    return data


@cache
def labelled(seed: int, part: str) -> tuple[Tensor, Tensor]:
    """Whole trunks [N 1 16 48 48] and the organ of each voxel."""
    data = trunks(seed)
    samples = data.bank if part == "unlabelled" else data.val
    rows = {"unlabelled": range(UNLABELLED), "tuning": range(LABELLED), "test": range(LABELLED, LABELLED + TEST)}[part]
    found = [samples.sample(row, 0) for row in rows]
    return torch.stack([one["volume"] for one in found]), torch.stack([one["segmentation"] for one in found])


def segmenter(known: Mapping[str, Tensor], rate: float, seed: int) -> Segmenter:
    """With a U-Net that has the weights of `known`, all of it or its way down, and others at random."""
    torch.manual_seed(seed)
    method = Segmenter(
        network(), len(ORGANS), "segmentation",
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.01),
        lr_scheduler=partial(WarmupCosine, final=0.0),
    )  # fmt: skip
    left = method.backbone.load_state_dict(known, strict=False)
    assert not left.unexpected_keys
    return method.eval()


def tune(method: Segmenter, given: tuple[Tensor, Tensor], steps: int, seed: int) -> Segmenter:
    """Trained on two trunks a step; in evaluation mode."""
    (volumes, organs), generator = given, np.random.default_rng(seed)
    rows = [torch.from_numpy(generator.choice(len(volumes), 2, replace=False)) for _ in range(steps)]
    batches: DataLoader[Any] = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=lambda row: {"volume": volumes[row], "segmentation": organs[row], "index": row},
    )
    if steps:
        quiet_trainer(max_steps=steps).fit(method, batches)
    return method.eval()


@torch.no_grad()
def dice(method: Segmenter, given: tuple[Tensor, Tensor]) -> float:
    """Mean over organs and trunks, in per cent."""
    guesses = torch.cat([method(volume[None]).argmax(dim=1) for volume in given[0]])
    found = [segmentation_scores(*pair, len(ORGANS)).dice[1:] for pair in zip(guesses, given[1], strict=True)]
    return 100 * float(np.nanmean(np.stack(found)))


def tuned(known: Mapping[str, Tensor], rate: float, seed: int, steps: int) -> dict[str, float]:
    """Dice of other trunks, and of those it is tuned on, before and after."""
    own, method = labelled(seed, "tuning"), segmenter(known, rate, seed)
    before = dice(method, own)
    tune(method, own, steps, seed)
    return {"dice": dice(method, labelled(seed, "test")), "own": dice(method, own), "own before": before}


@cache
def supervised(rate: float, seed: int, steps: int) -> Mapping[str, Tensor]:
    """Weights of a U-Net that learned the labels of all trunks that the others see without."""
    return tune(segmenter({}, rate, seed), labelled(seed, "unlabelled"), steps, seed).backbone.state_dict()
