"""Masks of V-JEPA: blocks of each frame that are hidden through the whole of a clip.

Source: Bardes et al., "Revisiting Feature Prediction for Learning Visual Representations from Video" (V-JEPA), 2024,
arXiv 2404.08471, section 3.2 and appendix: targets are the union of several blocks, which may overlap, at the same
places in all frames; short-range masks have 8 blocks with 0.15 of a frame's patches each, long-range masks 2 with 0.7.
As in the authors' code a block's sides are those of a step, the same for all clips; their places are each clip's own.
Difference: the unions of a batch differ in size, and their code cuts contexts and targets to the smallest of each, in
the order of patches. Here all masks hide one count and leave all others to see: blocks are placed again until their
union has it, and if it has it in none of `ATTEMPTS` draws, single patches are added to the nearest one, or taken away.
Shapes: B clips, T H W grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.masking.block_masks import block_at_random, block_sides
from lightspan.nn.masking.mask_samplers import MaskSampler

ATTEMPTS = 20


@dataclass(frozen=True)
class TubeBlocks(MaskSampler):
    """Hides the union of blocks of the axes of space, in every frame of a clip, whose first axis is time.

    Args:
        blocks: how many, at least 1.
        scale: share of a frame's patches in each, in (0, 1].
        aspect: each of its sides by the last one (height by width), least and most, > 0; uniform between them.
        hidden: share of a frame's patches that are hidden, in (0, 1); at least one is, and one is not. By the authors'
            rule the smallest context of 24 clips, those of a GPU, leaves out 0.78 of 14 x 14 patches in the median
            for 8 blocks of 0.15, and 0.96 for 2 of 0.7.
        seed: >= 0. Of two samplers of one method, each needs its own.
    """

    blocks: int = 8
    scale: float = 0.15
    aspect: tuple[float, float] = (0.75, 1.5)
    hidden: float = 0.78
    seed: int = 0

    def __post_init__(self) -> None:
        require_in("[1, inf)", blocks=self.blocks)
        require_in("(0, 1]", scale=self.scale)
        require_in("(0, inf)", aspect=self.aspect)
        require_in("(0, 1)", hidden=self.hidden)
        require_in("[0, inf)", seed=self.seed)
        if self.aspect[0] > self.aspect[1]:
            raise UserError(f"TubeBlocks aspect={[*self.aspect]} must be the least and the most")

    def draw(self, grid: tuple[int, ...], step: int, indices: Sequence[int], view: int = 0) -> np.ndarray:
        """bool [B T H W], see `MaskSampler`. Raises: UserError for a grid without an axis of space, or of frames of a
        single patch.
        """
        frame = grid[1:]
        if not frame or math.prod(frame) < 2:
            raise UserError(f"TubeBlocks need a grid of time and frames of two patches or more, and this is {[*grid]}")
        # A number more than clips have: numpy fills short seeds up with zeros, which are a clip's too.
        aspects = np.random.default_rng((self.seed, step, 0, 0, 1)).uniform(*self.aspect, len(frame) - 1)
        sides = block_sides(self.scale * math.prod(frame), aspects.tolist())
        size = [min(max(side, 1), most) for side, most in zip(sides, frame, strict=True)]
        count = min(max(1, round(self.hidden * math.prod(frame))), math.prod(frame) - 1)
        masks_BHW = np.zeros((len(indices), *frame), dtype=bool)
        for mask_HW, index in zip(masks_BHW, indices, strict=True):
            mask_HW[...] = self._one(frame, size, count, np.random.default_rng((self.seed, step, index, view)))
        return np.repeat(masks_BHW[:, None], grid[0], axis=1)

    def _one(self, frame: Sequence[int], size: Sequence[int], count: int, generator: np.random.Generator) -> np.ndarray:
        """A frame's mask, bool [H W]."""
        best_HW, apart = np.zeros(frame, dtype=bool), math.inf
        for _ in range(ATTEMPTS):
            union_HW = np.zeros(frame, dtype=bool)
            for _ in range(self.blocks):
                union_HW[block_at_random(frame, size, generator)] = True
            if (off := abs(int(union_HW.sum()) - count)) < apart:
                best_HW, apart = union_HW, off
            if not apart:
                break
        excess = int(best_HW.sum()) - count
        if excess:
            wrong = np.flatnonzero(best_HW == (excess > 0))
            best_HW.flat[generator.choice(wrong, abs(excess), replace=False)] ^= True
        return best_HW
