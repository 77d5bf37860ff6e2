"""Masks of the global views of a batch, for methods whose student guesses what hidden patches show.

Shapes: B images, R = G B global views.
"""

import numpy as np
from torch import Tensor

from lightspan.core.devices import has_values
from lightspan.nn.image_numbers import image_numbers
from lightspan.nn.masking.block_masks import MaskedPatches
from lightspan.nn.masking.mask_samplers import MaskSampler


def masks_of_views(
    sampler: MaskSampler, grid: tuple[int, ...], step: int, index_B: Tensor, global_views: int, masking: bool = True
) -> MaskedPatches:
    """Of G views, one after the other, on the device of the images' numbers.

    Args:
        index_B: the images' numbers in their dataset.
        masking: whether the run is at a step that masks patches at all; a plan counts what such a step needs.
    """
    if masking or not has_values(index_B):
        numbers = image_numbers(index_B)
        masks_R = np.concatenate([sampler.draw(grid, step, numbers, view) for view in range(global_views)])
    else:
        masks_R = np.zeros((global_views * len(index_B), *grid), dtype=bool)
    return MaskedPatches.of(masks_R, index_B.device)
