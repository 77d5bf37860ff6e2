"""Masks of patches, as functions of seed, step and the image's number: ranks, workers and resumed runs draw the same.

Source: Bao et al., "BEiT", 2021, arXiv 2106.08254, algorithm 1 (blocks); Zhou et al., "iBOT", 2021, arXiv 2111.07832
(half of the images masked, at a random ratio); Atito et al., "SiT", 2021, arXiv 2104.03602, and its code (rectangles
until a share is hidden). The last patches that no block fits are drawn one by one, as DINOv3's
code does it, so that a mask has exactly as many patches as were asked for.
Blocks are rectangles on a grid of two axes, as in these papers; on others they are intervals, boxes and so on.
Shapes: B images, H W grid of patches (or as many axes as it has), N masked patches of all images, w width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.nn.masking.mask_samplers import MaskSampler

LEAST_BLOCK, ATTEMPTS = 4, 10
"""Patches of the smallest block, and how often one that does not fit is drawn anew: BEiT's."""


@dataclass(frozen=True)
class BlockMasks(MaskSampler):
    """Masks a share of the images, each at a ratio of its own, by blocks.

    Args:
        probability: that an image is masked at all, in [0, 1].
        ratio: share of its patches, least and most, in [0, 1]; uniform between them.
        aspect: of a block, each side by the last one (height by width): uniform in the logarithm between this and its
            inverse, in (0, 1].
        seed: >= 0.
        least_block: patches of the smallest block, at least 1; those that no block of this size fits are drawn one by
            one.
    """

    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    aspect: float = 0.3
    seed: int = 0
    least_block: int = LEAST_BLOCK

    def __post_init__(self) -> None:
        least, most = self.ratio
        shares = 0 <= self.probability <= 1 and 0 <= least <= most <= 1 and 0 < self.aspect <= 1
        if not (shares and self.seed >= 0 and self.least_block >= 1):
            raise UserError(
                f"BlockMasks: probability={self.probability} must lie in [0, 1], ratio={list(self.ratio)} be two "
                f"numbers with 0 <= least <= most <= 1, aspect={self.aspect} lie in (0, 1], seed={self.seed} be at "
                f"least 0, and least_block={self.least_block} at least 1"
            )

    def draw(self, grid: tuple[int, ...], step: int, indices: Sequence[int], view: int = 0) -> np.ndarray:
        """bool [B H W], see `MaskSampler`."""
        masks_BHW = np.zeros((len(indices), *grid), dtype=bool)
        for mask_HW, index in zip(masks_BHW, indices, strict=True):
            generator = np.random.default_rng((self.seed, step, index, view))
            masked, share = generator.random(2)
            if masked < self.probability:
                ratio = self.ratio[0] + share * (self.ratio[1] - self.ratio[0])
                fill_blocks(mask_HW, int(math.prod(grid, start=ratio)), self.aspect, generator, self.least_block)
        return masks_BHW


@dataclass(frozen=True)
class RectangleMasks(MaskSampler):
    """Hides rectangles, which may overlap, until at least a share of a grid is hidden: SiT's, whose grid is of pixels.

    Each side of a rectangle is uniform between `align` and `longest` of the grid's; sides and places are rounded down
    to multiples of `align`. The last one exceeds the share by less than its own area, which of n axes is at most
    longest^n of the grid's (or align^n cells), so that counts differ between images.

    Args:
        share: in [0, 0.9]; more than that takes long, as rectangles seldom reach a corner.
        longest: by the side of the grid, in (0, 1].
        align: cells, at least 1, and the grid's sides are multiples of it. On pixels, the side of a patch makes every
            mask a union of whole patches.
        seed: >= 0.
    """

    share: float = 0.5
    longest: float = 0.3
    align: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 0.9 and 0 < self.longest <= 1 and self.align >= 1 and self.seed >= 0):
            raise UserError(
                f"RectangleMasks: share={self.share} must lie in [0, 0.9], longest={self.longest} in (0, 1], "
                f"align={self.align} be at least 1, and seed={self.seed} at least 0"
            )

    def draw(self, grid: tuple[int, ...], step: int, indices: Sequence[int], view: int = 0) -> np.ndarray:
        """bool [B H W], see `MaskSampler`. Raises: UserError for a grid whose sides are not multiples of `align`."""
        if any(side % self.align for side in grid):
            raise UserError(
                f"RectangleMasks hide rectangles of a grid whose sides are multiples of align={self.align}, and this "
                f"is {' x '.join(map(str, grid))}; set align to a divisor of all, such as the side of a patch"
            )
        masks_BHW = np.zeros((len(indices), *grid), dtype=bool)
        for mask_HW, index in zip(masks_BHW, indices, strict=True):
            generator, hidden = np.random.default_rng((self.seed, step, index, view)), 0
            while hidden < round(self.share * mask_HW.size, 6):
                block = mask_HW[tuple(self._piece(side, generator) for side in grid)]
                hidden += block.size - int(block.sum())
                block[:] = True
        return masks_BHW

    def _piece(self, side: int, generator: np.random.Generator) -> slice:
        """What a rectangle covers of a side."""
        length = int(generator.uniform(self.align, max(self.align, self.longest * side))) // self.align * self.align
        start = int(generator.integers((side - length) // self.align + 1)) * self.align
        return slice(start, start + length)


class MaskedPatches(NamedTuple):
    """Masks as networks and losses read them, on their device; made from arrays, so that no number of patches has to be
    asked of it.

    Attributes:
        hidden_BHW: bool, the masks.
        place_N: int64, of each masked patch among all B H W.
        weight_N: float32, 1 / masked patches of its image: a weighted sum over B is the mean over images of that over
            their masked patches, with 0 for an image without (iBOT's).
    """

    hidden_BHW: Tensor
    place_N: Tensor
    weight_N: Tensor

    @classmethod
    def of(cls, masks_BHW: np.ndarray, device: torch.device | str = "cpu") -> "MaskedPatches":
        counts_B = masks_BHW.sum(axis=tuple(range(1, masks_BHW.ndim)))
        weight_N = np.repeat(1 / np.maximum(counts_B, 1), counts_B).astype(np.float32)
        arrays = masks_BHW, np.flatnonzero(masks_BHW), weight_N
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    @property
    def images(self) -> int:
        """B."""
        return len(self.hidden_BHW)

    def tokens(self, tokens_BTw: Tensor) -> Tensor:
        """[N w], those of masked patches; T = H W."""
        return tokens_BTw.flatten(0, 1).index_select(0, self.place_N)


def fill_blocks(
    mask_HW: np.ndarray, count: int, aspect: float, generator: np.random.Generator, least: int = LEAST_BLOCK
) -> None:
    """Sets exactly `count` entries of an empty mask, by blocks of about `least` patches and more, which may overlap."""
    grid, left, widest = mask_HW.shape, count, abs(math.log(aspect))
    while left > 0:
        for _ in range(ATTEMPTS):
            area = generator.uniform(least, max(least, left))
            logarithms = generator.uniform(-widest, widest, size=len(grid) - 1)
            sides = block_sides(area, [*map(math.exp, logarithms)])
            if not all(0 < side <= most for side, most in zip(sides, grid, strict=True)):
                continue
            block = mask_HW[block_at_random(grid, sides, generator)]
            added = block.size - int(block.sum())
            if 0 < added <= left:
                block[:] = True
                left -= added
                break
        else:
            free = np.flatnonzero(~mask_HW)
            mask_HW.flat[generator.choice(free, left, replace=False)] = True
            return


def block_sides(area: float, aspects: Sequence[float]) -> tuple[int, ...]:
    """The sides of a block of about so many patches, of which all but the last have these ratios to the last one."""
    shape = [*aspects, 1.0]
    scale = (area / math.prod(shape)) ** (1 / len(shape))
    return tuple(round(scale * side) for side in shape)


def block_at_random(grid: Sequence[int], sides: Sequence[int], generator: np.random.Generator) -> tuple[slice, ...]:
    """A block of these sides anywhere in a grid that has room for it."""
    starts = [int(generator.integers(most - side + 1)) for most, side in zip(grid, sides, strict=True)]
    return tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))
