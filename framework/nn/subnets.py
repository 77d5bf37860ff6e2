"""Which sub-network trains in which step: a function of seed and step, so that ranks and resumed runs draw the same.

Source: "POA", arXiv 2408.01031, and the authors' code, which draws from a shuffled list without replacement and puts
small networks into it several times; the paper does not mention that.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in


class Size(NamedTuple):
    """Of a network with a part of the width (channels) and of the depth (blocks) of another."""

    width: int
    depth: int

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}"


class SubNetSampler:
    """Goes through a list of sub-networks in a random order, over and over, each time in a new one.

    A size is on the list round(s_w s_d) times, where s_w and s_d fall evenly from `small_first` for the smallest to 1
    for the largest width and depth. The whole network trains in every step anyway and is not on the list.

    Args:
        widths, depths: all that there are, in increasing order; the last of each are those of the whole network.
        small_first: at least 1; 1 draws all sizes equally often. 3 draws the smallest 9 times as often as the largest.
    """

    def __init__(self, widths: Sequence[int], depths: Sequence[int], small_first: float = 3.0, seed: int = 0) -> None:
        require_in("[1, inf)", small_first=small_first)
        require_in("[0, inf)", seed=seed)
        if len(widths) * len(depths) < 2:
            raise UserError(
                f"widths={list(widths)} and depths={list(depths)} hold the whole network alone; add a smaller size"
            )
        self.seed = seed
        self.cycle = [
            Size(width, depth)
            for width, by_width in zip(widths, np.linspace(small_first, 1, len(widths)), strict=True)
            for depth, by_depth in zip(depths, np.linspace(small_first, 1, len(depths)), strict=True)
            for _ in range(round(by_width * by_depth))
            if (width, depth) != (widths[-1], depths[-1])
        ]

    def at(self, step: int) -> Size:
        """The size of a step, counted from 0."""
        cycle, place = divmod(step, len(self.cycle))
        order = np.random.default_rng((self.seed, cycle)).permutation(len(self.cycle))
        return self.cycle[int(order[place])]
