"""Masks of the global views of a batch, for methods whose student guesses what hidden patches show.

Shapes: B images, G global views, H W grid of patches.
"""

import numpy as np
from torch import Tensor

from lightspan.devices import has_values
from lightspan.nn.block_masks import BlockMasks, MaskedPatches

PLANNED = 64
"""Images whose masks stand for those of all others in a plan."""


def masks_of_views(
    sampler: BlockMasks, grid: tuple[int, int], step: int, index_B: Tensor, global_views: int, masking: bool = True
) -> MaskedPatches:
    """Of G views, one after the other, on the device of the images' numbers.

    Args:
        index_B: the images' numbers. A plan knows none and may try any count of images: it takes the masks of a few
            again and again.
        masking: whether the run is at a step that masks patches at all; a plan counts what such a step needs.
    """
    masks_GBHW = np.zeros((global_views, len(index_B), *grid), dtype=bool)
    planned = not has_values(index_B)
    if planned or masking:
        indices = range(min(len(index_B), PLANNED)) if planned else index_B.tolist()
        for view, masks_BHW in enumerate(masks_GBHW):
            masks_BHW[:] = np.resize(sampler.draw(grid, step, indices, view), masks_BHW.shape)
    return MaskedPatches.of(masks_GBHW.reshape(-1, *grid), index_B.device)
