"""A context and several target blocks of an image: the masks of I-JEPA.

Source: Assran et al., "I-JEPA", CVPR 2023, arXiv 2301.08243, section 3 and appendix A.1: four target blocks with 0.15
to 0.2 of the patches and an aspect of 0.75 to 1.5 each; a square context block with 0.85 to 1 of them, without what
lies in a target. As in the authors' code the sizes of blocks are those of a step, the same for all images; their places
are each image's own.
Difference: their code cuts the contexts of a batch to the smallest one, in the order of rows, so that an image's
context depends on which others are beside it, and lower rows are cut. Here all contexts have one count, `context_keep`
of the patches, drawn among those that are left; blocks are placed again until enough are left, and if none of
`ATTEMPTS` draws leaves enough (small grids), patches of targets fill up the context of the best draw. In their code one
random number sets both the area and the aspect of a step's targets; here they are independent. The grid may have other
numbers of axes than two.
Shapes: B images, N target blocks, M patches of each, K of a context.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.nn.masking.block_masks import block_at_random, block_sides

ATTEMPTS = 20


class Blocks(NamedTuple):
    """Places of patches, counted row by row.

    Attributes:
        context_BK: int64, in increasing order.
        targets_BNM: int64, each block row by row.
    """

    context_BK: Tensor
    targets_BNM: Tensor


@dataclass(frozen=True)
class MultiBlock:
    """Draws contexts and target blocks.

    Args:
        targets: blocks to predict, at least 1.
        target_scale: share of the patches in each, least and most, in (0, 1].
        target_aspect: each of its sides by the last one (height by width), least and most, > 0; uniform between them,
            as in the authors' code.
        context_scale: share of the patches in the context block, before targets are taken away, in (0, 1].
        context_keep: share of the patches in every context, in (0, 1]; at least one patch. By the authors' rule the
            contexts of a batch of 128 images have 50 of 14 x 14 patches in the median, which 0.26 gives.
        seed: >= 0.
    """

    targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    context_keep: float = 0.26
    seed: int = 0

    def __post_init__(self) -> None:
        (a, b), (c, d), (e, f) = self.target_scale, self.target_aspect, self.context_scale
        if not (
            self.targets >= 1 and 0 < a <= b <= 1 and 0 < c <= d < math.inf and 0 < e <= f <= 1
            and 0 < self.context_keep <= 1 and self.seed >= 0
        ):  # fmt: skip
            raise UserError(
                f"MultiBlock: targets={self.targets} must be at least 1, target_scale={[a, b]} and context_scale="
                f"{[e, f]} two shares with 0 < least <= most <= 1, target_aspect={[c, d]} two numbers with 0 < least "
                f"<= most, context_keep={self.context_keep} in (0, 1], and seed={self.seed} at least 0"
            )

    def draw(self, grid: tuple[int, ...], step: int, indices: Sequence[int], view: int = 0) -> Blocks:
        """Blocks of these images.

        Args:
            indices: the images' numbers in their dataset.
            view: number of the view, each of which has blocks of its own.
        """
        # A number more than images have: numpy fills short seeds up with zeros, which are an image's too.
        sizes = np.random.default_rng((self.seed, step, 0, 0, 1))
        others = len(grid) - 1
        target = _size(grid, sizes.uniform(*self.target_scale), sizes.uniform(*self.target_aspect, others).tolist())
        context = _size(grid, sizes.uniform(*self.context_scale), [1.0] * others)
        count = max(1, int(round(self.context_keep * math.prod(grid), 6)))
        drawn = [
            self._one(grid, target, context, count, np.random.default_rng((self.seed, step, index, view)))
            for index in indices
        ]
        contexts, targets = [one[0] for one in drawn], [one[1] for one in drawn]
        shapes = (len(indices), count), (len(indices), self.targets, math.prod(target))
        arrays = (
            np.array(rows, dtype=np.int64).reshape(shape)
            for rows, shape in zip((contexts, targets), shapes, strict=True)
        )
        return Blocks(*map(torch.from_numpy, arrays))

    def _one(
        self,
        grid: tuple[int, ...],
        target: tuple[int, ...],
        context: tuple[int, ...],
        count: int,
        generator: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One image's context [K] and targets [N M]."""
        best_T, best_NM = np.zeros(math.prod(grid), dtype=bool), np.zeros((0, 0), dtype=np.int64)
        for attempt in range(ATTEMPTS):
            targets_NM = np.stack([_block(grid, target, generator) for _ in range(self.targets)])
            left_T = np.zeros_like(best_T)
            left_T[_block(grid, context, generator)] = True
            left_T[targets_NM] = False
            if attempt == 0 or left_T.sum() > best_T.sum():
                best_T, best_NM = left_T, targets_NM
            if best_T.sum() >= count:
                break
        missing = count - int(best_T.sum())
        if missing > 0:
            best_T[generator.choice(np.flatnonzero(~best_T), missing, replace=False)] = True
        return np.sort(generator.choice(np.flatnonzero(best_T), count, replace=False)), best_NM


def _size(grid: tuple[int, ...], share: float, aspects: Sequence[float]) -> tuple[int, ...]:
    """The sides in patches of a block with this share of the patches; what exceeds the grid is cut off.

    Where the authors' code keeps blocks one patch below the grid's sides, a context here may be the whole image.
    """
    sides = block_sides(share * math.prod(grid), aspects)
    return tuple(min(max(side, 1), most) for side, most in zip(sides, grid, strict=True))


def _block(grid: tuple[int, ...], size: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Places of the patches of a block anywhere in the grid, in increasing order."""
    return np.arange(math.prod(grid)).reshape(grid)[block_at_random(grid, size, generator)].ravel()
