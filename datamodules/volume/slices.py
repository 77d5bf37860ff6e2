"""Slices of volumes as images, for methods that learn from both.

Shapes: C channels, D H W voxels, N slices, V views.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightspan.core.ranges import require_in
from lightspan.datamodules.image.augment.views import VIEWS, Views, seeded


@dataclass(frozen=True)
class SliceViews:
    """Some slices of a crop, across D, and random views of each.

    Args:
        views: of one slice, an image with intensities in [0, 1], such as
            `lightspan.datamodules.image.augment.views.RandomViews`.
        count: N, slices that are drawn without replacement, in [1, 4096].
    """

    views: Views
    count: int = 8

    def __post_init__(self) -> None:
        require_in(VIEWS, count=self.count)

    def __call__(self, crop_CDHW: Tensor, seed: int) -> list[Tensor]:
        """V views [N C h w], a function of the seed.

        Args:
            crop_CDHW: float32, of at least N slices.
        """
        with seeded(seed):
            chosen_N = torch.randperm(crop_CDHW.shape[1])[: self.count].sort().values
            views_NV = [self.views(crop_CDHW[:, number]) for number in chosen_N]
        return [torch.stack(same) for same in zip(*views_NV, strict=True)]
