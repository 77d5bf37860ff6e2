"""Maps of mixing coefficients in equal blocks, as functions of seed, step and sample.

Source: Wang et al., "MIS-FM: 3D Medical Image Segmentation using Foundation Models Pretrained on a Large-Scale
Unannotated Dataset", 2023, arXiv 2306.16925, and its code, which draws one size of blocks for each sample: a grid of
whole blocks at a random offset, of which a share is foreground.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightspan.core.ranges import require_in


@dataclass(frozen=True)
class CoefficientMaps:
    """Which of the coefficients 0, 1/K, ..., 1 each voxel has. Background, and the border that the grid of blocks
    leaves free, has 0; each block of the foreground has one of the others, all equally likely.

    Args:
        levels: K, at least 1.
        edges: the shortest and the longest edge of a block in voxels, drawn for each axis by itself, at least 1. A
            longer one than the sample is cut to it.
        ratio: share of blocks that are foreground, rounded down, in [0, 1].
        seed: >= 0.
    """

    levels: int = 4
    edges: tuple[int, int] = (8, 32)
    ratio: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        require_in("[1, inf)", levels=self.levels, edges=self.edges)
        require_in(f"[{self.edges[0]}, inf)", longest_edge=self.edges[1])
        require_in("[0, 1]", ratio=self.ratio)
        require_in("[0, inf)", seed=self.seed)

    def draw(self, size: Sequence[int], step: int, indices: Sequence[int]) -> np.ndarray:
        """K times the coefficient, int64 [B size...].

        Args:
            indices: the samples' numbers in their dataset.
        """
        maps = [self._map(size, np.random.default_rng((self.seed, step, index))) for index in indices]
        return np.array(maps, dtype=np.int64).reshape(len(indices), *size)

    def _map(self, size: Sequence[int], generator: np.random.Generator) -> np.ndarray:
        shortest, longest = self.edges
        edges = [min(int(generator.integers(shortest, longest + 1)), side) for side in size]
        grid = [side // edge for side, edge in zip(size, edges, strict=True)]
        first = [int(generator.integers(side % edge + 1)) for side, edge in zip(size, edges, strict=True)]
        levels = np.zeros(math.prod(grid), dtype=np.int64)
        foreground = int(self.ratio * len(levels))
        levels[:foreground] = generator.integers(1, self.levels + 1, size=foreground)
        blocks = generator.permutation(levels).reshape(grid)
        for axis, edge in enumerate(edges):
            blocks = blocks.repeat(edge, axis=axis)
        room = [(at, side - at - taken) for at, side, taken in zip(first, size, blocks.shape, strict=True)]
        return np.pad(blocks, room)
