"""How well labels of pixels or voxels are guessed: overlap, and distances between surfaces in millimetres.

Shapes: D H W voxels, or sides of any number of axes; K classes, S voxels of a surface.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from torch import Tensor
from torchmetrics.functional.classification import multiclass_stat_scores

from lightspan.core.errors import UserError


class SegmentationScores(NamedTuple):
    """Of each class, float64 [K]. NaN of a class that is neither guessed nor true.

    dice: 2 |A and B| / (|A| + |B|), in [0, 1].
    surface_mm: mean distance from the surface of each to that of the other, over the voxels of both; infinite if one of
        them has no voxel.
    hausdorff95_mm: the 95th percentile of these distances.
    """

    dice: np.ndarray
    surface_mm: np.ndarray
    hausdorff95_mm: np.ndarray


def segmentation_scores(
    guess: Tensor, truth: Tensor, num_classes: int, spacing: Sequence[float] | None = None
) -> SegmentationScores:
    """Of one volume or picture.

    Args:
        guess, truth: whole numbers [sides...], guesses in [0, K). Where truth is -1 nothing is known or counted.
        spacing: between voxels along each axis, in mm; None is 1.
    Raises: UserError for shapes that differ.
    """
    if guess.shape != truth.shape or (spacing is not None and len(spacing) != truth.ndim):
        raise UserError(f"guess {[*guess.shape]}, truth {[*truth.shape]} and spacing={spacing} must have the same axes")
    known = truth >= 0
    counts_K5 = multiclass_stat_scores(
        guess[known][None], truth[known][None], num_classes, average="none", multidim_average="global"
    ).double()
    tp, fp, _, fn, _ = counts_K5.unbind(1)
    guess_np, truth_np = (part.masked_fill(~known, -1).cpu().numpy() for part in (guess, truth))
    found = [surface_distances(guess_np == k, truth_np == k, spacing) for k in range(num_classes)]
    return SegmentationScores(
        (2 * tp / (2 * tp + fp + fn)).cpu().numpy(),
        np.array([apart.mean() if apart.size else np.nan for apart in found]),
        np.array([np.percentile(apart, 95, method="higher") if apart.size else np.nan for apart in found]),
    )


def surface_distances(a: np.ndarray, b: np.ndarray, spacing: Sequence[float] | None = None) -> np.ndarray:
    """Distances of the voxels on each surface from the nearest on the other, float64 [S]: infinite if one of the two
    has no voxel, and none if both have not. On the surface is what has a neighbour outside, or no neighbour, along an
    axis.

    Args:
        a, b: bool [sides...].
        spacing: see `segmentation_scores`.
    """
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (a, b)]
    found = []
    for own, other in (surfaces, surfaces[::-1]):
        if other.any():
            found.append(ndimage.distance_transform_edt(~other, sampling=spacing)[own])
        else:
            found.append(np.full(int(own.sum()), np.inf))
    return np.concatenate(found)
