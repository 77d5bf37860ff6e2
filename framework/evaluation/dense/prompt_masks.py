"""Segmentation without training: one patch of an object is the prompt, and patches similar to it are the answer.

Source: "Masked Momentum Contrastive Learning for Zero-shot Semantic Understanding" (MMC), 2023, arXiv 2308.11448: IoU
of thresholded cosine maps, and the overlap of similarities within and between objects. Features are those of the last
block after its norm. Thresholds do not carry over from one model to another: choose one on images that are not
reported.
Shapes: P patches of an image on a grid H W, D width, h w pixels of the image, S thresholds. Volumes and the like have
as many axes as their grid where images have two.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.dense.patches import at_pixels, fitted, majority_of_patches
from lightspan.evaluation.rows import spaced_rows, unit_rows
from lightspan.nn.sequences.patches import cells_to_pixels

BACKGROUND = 0
"""The number of what is no object; objects are numbered from 1."""
CANDIDATES = 50
"""Thresholds among which one is chosen."""
IMAGES_TO_CHOOSE_BY, COSINES_OF_EACH = 64, 1 << 16
"""Of how many images how many similarities are ordered for it, evenly spaced."""


def prompt_maps(patches_PD: Tensor) -> Tensor:
    """Cosine of every patch with every prompt, [P P] in [-1, 1]; a patch of zeros is similar to none, 0."""
    unit_PD = unit_rows(patches_PD)
    return (unit_PD @ unit_PD.T).clamp(-1, 1)


def objects_of_patches(objects_hw: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The object that covers more than half of each patch, int64 [P]; the background where none does.

    Raises: UserError for patches that do not fill the image.
    """
    return majority_of_patches(objects_hw[None], grid, BACKGROUND)[0]


def prompt_ious(
    patches_PD: Tensor,
    objects_hw: Tensor,
    grid: tuple[int, ...],
    thresholds: Sequence[float],
    counted_hw: Tensor | None = None,
) -> Tensor:
    """IoU of {pixels with similarity > t} with the prompt's object, mean over all prompts inside objects: [S].

    Maps are enlarged to the image's pixels, linear along each axis. An image without a patch that is mostly of one
    object gives NaN: leave it out of means (`torch.nanmean`).

    Args:
        patches_PD: row by row.
        objects_hw: int64, the number of each pixel's object, 0 for the background.
        counted_hw: bool, which pixels count in both masks; None counts all.
    Raises: UserError for another number of patches, or patches that do not fill the image.
    """
    if len(patches_PD) != math.prod(grid):
        raise UserError(f"{len(patches_PD)} patches are not a grid of {' x '.join(map(str, grid))}")
    object_P = objects_of_patches(objects_hw, grid)
    prompts_Q = (object_P != BACKGROUND).nonzero()[:, 0]
    maps_Q1HW = prompt_maps(patches_PD)[prompts_Q].unflatten(1, grid).unsqueeze(1)
    if not len(prompts_Q):
        return maps_Q1HW.new_full((len(thresholds),), torch.nan)
    maps_Qhw = at_pixels(maps_Q1HW, tuple(objects_hw.shape))[:, 0]
    own_Qhw = _one_by_one(object_P[prompts_Q], objects_hw)
    if counted_hw is not None:
        maps_Qhw, own_Qhw = maps_Qhw.masked_fill(~counted_hw, -torch.inf), own_Qhw & counted_hw
    return torch.stack([iou(maps_Qhw > threshold, own_Qhw).mean() for threshold in thresholds])


def candidate_thresholds(patches_NPD: Tensor, objects_Nhw: Tensor, grid: tuple[int, ...]) -> tuple[float, ...]:
    """Thresholds that tell the similarities of these images apart, ascending, in (-1, 1), at most `CANDIDATES`.

    They lie halfway between neighbouring quantiles of the cosines of all prompts inside objects with all patches, so
    that they are dense where similarities are: the cosines of a network may all lie above 0.9, or all be 0 or 1. The
    lowest quantile is -1, whatever the similarities. Without a prompt it is 0 alone.

    Args:
        objects_Nhw: as in `prompt_ious`, of any size.
    """
    found = [patches_NPD.new_zeros(0, dtype=torch.float32)]
    for row in spaced_rows(torch.arange(len(patches_NPD)), IMAGES_TO_CHOOSE_BY).tolist():
        object_P = objects_of_patches(fitted(objects_Nhw[row : row + 1].long(), grid)[0], grid)
        cosines = prompt_maps(patches_NPD[row])[object_P > BACKGROUND]
        found.append(spaced_rows(cosines.flatten(), COSINES_OF_EACH).float())
    ordered = torch.cat(found).sort().values
    if not len(ordered):
        return (0.0,)
    quantiles = torch.cat([ordered.new_full((1,), -1), spaced_rows(ordered, CANDIDATES)]).double().unique()
    return tuple(((quantiles[1:] + quantiles[:-1]) / 2).tolist())


def iou(a_Qhw: Tensor, b_Qhw: Tensor) -> Tensor:
    """Pixels in both masks over those in either, float64 [Q] in [0, 1]; 1 for two empty ones."""
    both, either = ((a_Qhw & b_Qhw).flatten(1).sum(dim=1), (a_Qhw | b_Qhw).flatten(1).sum(dim=1))
    return torch.where(either > 0, both.double() / either.clamp_min(1), 1.0)


def best_iou_of_grid(objects_hw: Tensor, grid: tuple[int, ...]) -> float:
    """The mean IoU that whole patches can reach at most by majority, over the prompts that `prompt_ious` takes; NaN
    without one.
    """
    object_P = objects_of_patches(objects_hw, grid)
    object_Q = object_P[object_P != BACKGROUND]
    if not len(object_Q):
        return float("nan")
    patch = [side // count for side, count in zip(objects_hw.shape, grid, strict=True)]
    coarse_hw = cells_to_pixels(object_P.unflatten(0, grid), patch)
    return float(iou(_one_by_one(object_Q, coarse_hw), _one_by_one(object_Q, objects_hw)).mean())


def _one_by_one(object_Q: Tensor, objects_hw: Tensor) -> Tensor:
    """The mask of each of these objects, bool [Q h w]."""
    return objects_hw == object_Q.view(-1, *[1] * objects_hw.ndim)


class Similarities(NamedTuple):
    """Cosines of pairs of different patches that lie in objects of one image: in the same one, and in two."""

    intra: Tensor
    inter: Tensor

    def auc(self) -> float:
        """Probability that a pair within an object is the more similar one, equal ones counting half, in [0, 1]; NaN
        without pairs of both kinds.
        """
        n, m = len(self.intra), len(self.inter)
        if not n or not m:
            return float("nan")
        values, place = torch.cat([self.intra, self.inter]).unique(return_inverse=True)
        intra, inter = (torch.bincount(part, minlength=len(values)).double() for part in place.split([n, m]))
        below = inter.cumsum(dim=0) - inter
        return float((intra * (below + 0.5 * inter)).sum() / (n * m))

    def overlap(self, bins: int = 100) -> float:
        """Common area of both histograms over [-1, 1], in [0, 1]; NaN without pairs of both kinds."""
        if not len(self.intra) or not len(self.inter):
            return float("nan")
        shares = [torch.histc(part.float(), bins, -1, 1) / len(part) for part in self]
        return float(torch.minimum(*shares).sum())


def object_similarities(patches_PD: Tensor, object_P: Tensor) -> Similarities:
    """Of one image, each pair once; join those of several images by `torch.cat`."""
    inside = object_P != BACKGROUND
    cosine, object_Q = prompt_maps(patches_PD[inside]), object_P[inside]
    first, second = torch.triu_indices(len(object_Q), len(object_Q), offset=1)
    pairs, same = cosine[first, second], object_Q[first] == object_Q[second]
    return Similarities(pairs[same], pairs[~same])
