"""Images, volumes and series as patches, patches picked by their places, and cells of a grid as pixels.

Patches are numbered row by row, the last axis fastest, and a patch's pixels likewise with its channels last: the order
of MAE's code (He et al., 2021, arXiv 2111.06377), whatever the number of axes.
Shapes: B batch, C channels, T patches, d numbers of a patch (its pixels times C), K places, w width.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError


def grid_of(sides: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """How many patches fit along each side. Raises: UserError for another number of axes, or sides that they do not
    fill.
    """
    reason = None
    if len(sides) != len(patch):
        reason = f"samples have {len(sides)} axes after the channels, and patches {len(patch)}"
    elif min(patch) < 1 or any(side % p or not side for side, p in zip(sides, patch, strict=True)):
        reason = "each side must be a multiple of the patch's"
    if reason is not None:
        raise UserError(
            f"{' x '.join(map(str, sides))} cannot be cut into patches of {' x '.join(map(str, patch))}; {reason}"
        )
    return tuple(side // p for side, p in zip(sides, patch, strict=True))


def patchify(x_BC: Tensor, patch: Sequence[int]) -> Tensor:
    """[B C sides...] -> [B T d]. Raises: UserError for sides that patches do not fill.

    Args:
        patch: its sides, one for each axis after the channels, however many there are.
    """
    grid, axes = grid_of(x_BC.shape[2:], patch), len(patch)
    split = x_BC.reshape(*x_BC.shape[:2], *(side for pair in zip(grid, patch, strict=True) for side in pair))
    places, pixels = [2 + 2 * axis for axis in range(axes)], [3 + 2 * axis for axis in range(axes)]
    return split.permute(0, *places, *pixels, 1).flatten(1 + axes).flatten(1, axes)


def patch_images(x_BC: Tensor, patch: Sequence[int]) -> Tensor:
    """Patches as samples of their own, for a network that sees each alone: [B C sides...] -> [B T C patch...].

    Raises: UserError as `patchify`.
    """
    return patchify(x_BC, patch).unflatten(2, (*patch, x_BC.shape[1])).movedim(-1, 2)


def unpatchify(patches_BTd: Tensor, patch: Sequence[int], grid: Sequence[int]) -> Tensor:
    """The inverse of `patchify`: [B T d] -> [B C sides...]. Raises: UserError for other numbers of patches or pixels.

    Args:
        patch: its sides in pixels.
        grid: patches along each side.
    """
    axes, (batch, count, numbers) = len(patch), patches_BTd.shape
    if math.prod(grid) != count or numbers % math.prod(patch):
        raise UserError(
            f"{count} patches of {numbers} numbers are not a grid of {' x '.join(map(str, grid))} patches of "
            f"{' x '.join(map(str, patch))} pixels"
        )
    channels = numbers // math.prod(patch)
    split = patches_BTd.reshape(batch, *grid, *patch, channels)
    order = [axis for pair in zip(range(1, 1 + axes), range(1 + axes, 1 + 2 * axes), strict=True) for axis in pair]
    sides = (g * p for g, p in zip(grid, patch, strict=True))
    return split.permute(0, 1 + 2 * axes, *order).reshape(batch, channels, *sides)


def cells_to_pixels(cells: Tensor, cell: Sequence[int]) -> Tensor:
    """Each cell of a grid repeated over the pixels that it covers: [... grid...] -> [... sides...].

    Args:
        cell: its sides in pixels, one for each of the last axes.
    """
    for axis, side in enumerate(cell, start=cells.ndim - len(cell)):
        cells = cells.repeat_interleave(side, dim=axis)
    return cells


def places(masks_B: np.ndarray) -> np.ndarray:
    """Where masks are True, in increasing order, counted over the grid row by row: bool [B grid...] -> int64 [B K].

    Raises: UserError for masks with different counts.
    """
    flat_BT = masks_B.reshape(len(masks_B), math.prod(masks_B.shape[1:]))
    counts = set(flat_BT.sum(axis=1).tolist()) or {0}
    if len(counts) > 1:
        raise UserError(
            f"masks of one batch hold {min(counts)} to {max(counts)} patches; indices need one count: use a sampler "
            "of exact counts, such as lightspan.nn.masking.mask_samplers.RandomMasks"
        )
    return np.nonzero(flat_BT)[1].reshape(len(masks_B), counts.pop())


def at_places(tokens_BTw: Tensor, places_BK: Tensor) -> Tensor:
    """[B K w], the tokens of these places."""
    return tokens_BTw.gather(1, places_BK[..., None].expand(-1, -1, tokens_BTw.shape[2]))


def kept(tokens_BTw: Tensor, places_BK: Tensor, prefix: int) -> Tensor:
    """[B prefix+K w]: the first `prefix` tokens, then those of patches at these places."""
    return torch.cat([tokens_BTw[:, :prefix], at_places(tokens_BTw[:, prefix:], places_BK)], dim=1)
