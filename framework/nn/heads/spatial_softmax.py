"""Where the features of a map are, in place of how strong they are.

Source: Finn et al., "Deep Spatial Autoencoders for Visuomotor Learning", 2016, arXiv 1509.06113, section V-A.
Shapes: B images, C features, H W map.
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide


def spatial_softmax(map_BCHW: Tensor) -> Tensor:
    """The expected place of each feature, [B C 2], under a softmax of it over the map: its column, then its row, both
    from -1 at the middle of the first pixel to 1 at that of the last; 0 along an axis of one pixel.

    A constant map gives the middle. Computed in float32 or wider.
    """
    wide_map = wide(map_BCHW)
    share_BCHW = wide_map.flatten(2).softmax(dim=2).view_as(wide_map)
    row_H, column_W = (_axis(size, share_BCHW) for size in share_BCHW.shape[2:])
    column_BC, row_BC = share_BCHW.sum(dim=2) @ column_W, share_BCHW.sum(dim=3) @ row_H
    return torch.stack([column_BC, row_BC], dim=2).to(map_BCHW.dtype)


def _axis(size: int, like: Tensor) -> Tensor:
    if size == 1:
        return torch.zeros(1, device=like.device, dtype=like.dtype)
    return torch.linspace(-1, 1, size, device=like.device, dtype=like.dtype)
