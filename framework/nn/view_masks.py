"""Masks of the global views of a batch, for methods whose student guesses what hidden patches show.

Shapes: B images, G global views, H W grid of patches.
"""

import numpy as np
from torch import Tensor

from lightspan.devices import has_values
from lightspan.nn.block_masks import BlockMasks, MaskedPatches
from lightspan.nn.mask_samplers import for_images


def masks_of_views(
    sampler: BlockMasks, grid: tuple[int, int], step: int, index_B: Tensor, global_views: int, masking: bool = True
) -> MaskedPatches:
    """Of G views, one after the other, on the device of the images' numbers.

    Args:
        index_B: the images' numbers in their dataset.
        masking: whether the run is at a step that masks patches at all; a plan counts what such a step needs.
    """
    if masking or not has_values(index_B):
        drawn = [
            for_images(index_B, lambda indices, view=view: sampler.draw(grid, step, indices, view))  # type: ignore[misc]
            for view in range(global_views)
        ]
        masks_RHW = np.concatenate(drawn)
    else:
        masks_RHW = np.zeros((global_views * len(index_B), *grid), dtype=bool)
    return MaskedPatches.of(masks_RHW, index_B.device)
