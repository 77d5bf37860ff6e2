"""Segmentation of rooms in which rare classes count: most of their points are floor and wall.

Shapes: N points, K classes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.methods.supervised.point_segmenter import PointSegmenter


def rarity(classes: Iterable[Tensor], count: int) -> Tensor:
    """Weights of classes, [K], by the inverse root of their share of all points; 0 of those that are not there.

    Args:
        classes: of the points of each room; those below 0 do not count.
    """
    share_K = sum((of[of >= 0].bincount(minlength=count) for of in classes), torch.zeros(count))
    return torch.where(share_K > 0, (share_K.sum() / share_K).sqrt(), 0.0)


def rare_cross_entropy(logits_NK: Tensor, label_N: Tensor, weight_K: Tensor) -> Tensor:
    """The mean over known points with the weights of their classes; 0 without any."""
    known_N = label_N >= 0
    losses_N = F.cross_entropy(logits_NK, label_N.clamp_min(0), weight_K, reduction="none")
    total = (weight_K[label_N.clamp_min(0)] * known_N).sum()
    return (losses_N * known_N).sum() / total.clamp_min(1e-12)


class RareSegmenter(PointSegmenter):
    """A `PointSegmenter` whose loss has weights of classes, see `rarity`."""

    def __init__(self, backbone: Any, weight_K: Tensor, **settings: Any) -> None:
        super().__init__(backbone, len(weight_K), **settings)
        self.register_buffer("weight_K", weight_K)

    def loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        _, logits_NK, label_N = super().loss(batch)
        return rare_cross_entropy(logits_NK, label_N, self.weight_K), logits_NK, label_N
