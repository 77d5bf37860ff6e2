"""Structural similarity of pictures.

Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004, section III.B.
With means mu, variances v and covariance c of two pictures under a Gaussian window around each pixel,
SSIM = (2 mu_x mu_y + C1) (2 c + C2) / ((mu_x^2 + mu_y^2 + C1) (v_x + v_y + C2)), C1 = 0.01^2, C2 = 0.03^2.
Shapes: B pictures, C channels, H W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide

REACH, SPREAD = 5, 1.5  # of the window, in pixels: 11 on a side
C1, C2 = 0.01**2, 0.03**2


def structural_similarity(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """At each pixel and channel, [B C H W] in [-1, 1], of pictures in [0, 1], in float32 or wider. At the border a
    window is cut off, and its weights sum to 1 as elsewhere, so that pictures may have any sides.
    """
    x, y = wide(x_BCHW), wide(y_BCHW)
    both = torch.cat([x, y, x * x, y * y, x * y], dim=1)
    with torch.autocast(x.device.type, enabled=False):
        for axis in (2, 3):
            both = _blurred(both, axis)
    mean_x, mean_y, xx, yy, xy = both.chunk(5, dim=1)
    alike = (2 * mean_x * mean_y + C1) * (2 * (xy - mean_x * mean_y) + C2)
    apart = (mean_x.square() + mean_y.square() + C1) * ((xx - mean_x.square() + yy - mean_y.square()) + C2)
    return alike / apart


def _blurred(x_BCHW: Tensor, axis: int) -> Tensor:
    """Means along an axis under the window."""
    lines = x_BCHW.movedim(axis, -1)
    steps = torch.arange(-REACH, REACH + 1, device=lines.device, dtype=lines.dtype)
    weight_11K = torch.exp(-(steps / SPREAD).square() / 2)[None, None]
    whole = F.conv1d(torch.ones_like(lines[:1, :1, :1].flatten(0, 1)), weight_11K, padding=REACH)
    sums = F.conv1d(lines.reshape(-1, 1, lines.shape[-1]), weight_11K, padding=REACH)
    return (sums / whole).view(lines.shape).movedim(-1, axis)
