"""Crops of drawn trunks on a grid of base crops, and how well their places are told: what VoCo and VoCo-L share.

Shapes: B trunks, M crops at random places, K base crops, V of both, D embedding width.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from labelled_trunks import trunks
from torch import Tensor

from lightspan.core.collate import collated
from lightspan.datamodules.volume.augment import VolumeAugmentation
from lightspan.datamodules.volume.data import VolumeSamples
from lightspan.datamodules.volume.phantoms import Phantoms
from lightspan.nn.base_crops import base_crops_of, by_volume
from lightspan.objectives.overlaps import positive_cosines

SIZE, BASES, CROPS = 16, (1, 3, 3), 4
AUGMENT = VolumeAugmentation(flip=(0.2, 0.2, 0.2), turn=0.2, offset=0.1)


@cache
def crops(seed: int) -> Phantoms:
    return trunks(seed, AUGMENT, size=SIZE, bases=BASES, crops=CROPS)


@torch.no_grad()
def places(embedded: Callable[[Tensor], Tensor], seed: int) -> dict[str, float]:
    """Of crops of held-out trunks: how far the mean place of base crops, weighted by similarity, is from theirs, over
    the same of the middle of all; and weighted by overlap.

    Args:
        embedded: crops [N 1 16 16 16] -> [N D].
    """
    data = crops(seed)
    assert data.train is not None
    held = VolumeSamples(data.train.archive, data.val.numbers, data.size, True, 8, None, BASES)
    batch: Any = collated([held.sample(row, row) for row in range(len(held))])
    views, overlap_BMK = base_crops_of(batch, "places")
    bases_BKD, crops_BMD = by_volume(embedded(views), overlap_BMK)
    at_BV3 = batch["corner"].float()
    at_BK3, at_BM3 = at_BV3[:, : overlap_BMK.shape[2]], at_BV3[:, overlap_BMK.shape[2] :]

    def error(weight_BMK: Tensor) -> float:
        guess_BM3 = (weight_BMK / weight_BMK.sum(dim=2, keepdim=True).clamp_min(1e-12)) @ at_BK3
        return float((guess_BM3 - at_BM3).norm(dim=2).mean())

    middle = error(torch.ones_like(overlap_BMK))
    return {"error": error(positive_cosines(crops_BMD, bases_BKD)) / middle, "least": error(overlap_BMK) / middle}
