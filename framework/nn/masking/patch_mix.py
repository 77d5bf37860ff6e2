"""Several images in one grid: each place shows a patch of one of them, or none.

Source: Su et al., "M3I" (Towards All-in-one Pre-training via Maximizing Multi-modal Mutual Information), CVPR 2023,
arXiv 2211.09807, section 3.3: images mixed by complementary random masks, each guessed from its own part. With one
image and hidden places it is the random masking of MAE (2111.06377).
Shapes: B images, C h w image (or as many axes as the grid has), M sources, R = ceil(B / M) mixtures, T places of the
grid, K places that show a source, A = T - K others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.nn.image_numbers import image_numbers
from lightspan.nn.masking.mask_samplers import visible_count
from lightspan.nn.sequences.patches import patchify, unpatchify


@dataclass(frozen=True)
class Mixtures:
    """Mixed images, and of each source the places that show it and those that do not.

    Attributes:
        image_RChw: places that show no source have the first one's pixels; a network is to see `see_RS` alone.
        rows_MR: int64, which image each source is. The first B of the M R sources are the images in their order; what
            is beyond fills up the last mixtures, and `of_images` leaves it out.
        see_MRK, ask_MRA: int64 places, a tensor for each source; K differs by at most 1 between sources.
    """

    image_RChw: Tensor
    rows_MR: Tensor
    see_MRK: list[Tensor]
    ask_MRA: list[Tensor]
    images: int

    @property
    def see_RS(self) -> Tensor:
        """All places that show a source, source by source."""
        return torch.cat(self.see_MRK, dim=1)

    def sources(self, tokens_RSD: Tensor) -> list[Tensor]:
        """Tokens of `see_RS` by source: M tensors [R K D]."""
        return [*tokens_RSD.split([see_RK.shape[1] for see_RK in self.see_MRK], dim=1)]

    def of_images(self, of_sources: Sequence[Tensor]) -> Tensor:
        """What each source gave, M tensors [R ...], image by image: [B ...]."""
        return torch.cat([*of_sources])[: self.images]


@dataclass(frozen=True)
class PatchMix:
    """Mixes the images of a batch; which places show which is a function of seed, step and the first image's number.

    Args:
        sources: M, images in a mixture, at least 1. Image r is mixed with image r + R, r + 2 R and so on; where they
            do not come out even, with some that have their place in another mixture too.
        hidden: share of the places that show no image, in [0, 1).
        seed: >= 0.
    """

    sources: int = 2
    hidden: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sources < 1 or not 0 <= self.hidden < 1 or self.seed < 0:
            raise UserError(
                f"PatchMix: sources={self.sources} must be at least 1, hidden={self.hidden} lie in [0, 1), and seed="
                f"{self.seed} be at least 0"
            )

    def __call__(
        self, image_BChw: Tensor, patch: Sequence[int], grid: tuple[int, ...], index_B: Tensor, step: int
    ) -> Mixtures:
        """Mixtures of a batch.

        Args:
            patch, grid: sides of a patch in pixels, and patches along each side.
            index_B: the images' numbers in their dataset.
        Raises: UserError for a grid with fewer visible places than sources.
        """
        images, places = len(image_BChw), math.prod(grid)
        seen, mixtures = visible_count(self.hidden, places), -(-images // self.sources)
        if seen < self.sources:
            raise UserError(
                f"PatchMix: of {places} patches {seen} are seen, too few for sources={self.sources}; lower sources or "
                "hidden, or take larger images or smaller patches"
            )
        rows_MR = np.arange(self.sources * mixtures).reshape(self.sources, mixtures) % max(images, 1)
        numbers = image_numbers(index_B)[:mixtures]
        order_RT = np.array(
            [np.random.default_rng((self.seed, step, number)).permutation(places) for number in numbers], dtype=np.int64
        ).reshape(mixtures, places)
        ends = [seen * source // self.sources for source in range(self.sources + 1)]
        owner_RT = np.zeros_like(order_RT)
        see, ask = [], []
        for source, (first, last) in enumerate(pairwise(ends)):
            see.append(order_RT[:, first:last])
            ask.append(np.delete(order_RT, np.s_[first:last], axis=1))
            np.put_along_axis(owner_RT, see[-1], source, axis=1)

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(image_BChw.device)

        rows, owner = put(rows_MR), put(owner_RT)
        patches_MRTd = patchify(image_BChw, patch)[rows.flatten()].unflatten(0, (self.sources, mixtures))
        at_1RTd = owner[None, :, :, None].expand(1, -1, -1, patches_MRTd.shape[3])
        mixed_RChw = unpatchify(patches_MRTd.gather(0, at_1RTd)[0], patch, grid)
        return Mixtures(mixed_RChw, rows, [*map(put, see)], [*map(put, ask)], images)
