"""Features of coarse points at finer ones.

Source: Qi et al., "PointNet++", 2017, arXiv 1706.02413, section 3.4, equation 2, with squared distances as in its code.
Shapes: B clouds, S coarse and G fine points, D features.
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.nn.points.groups import nearest_points
from lightspan.nn.sequences.patches import at_places

LEAST = 1e-8
"""What is added to squared distances, as a share of the largest of a point, so that units do not matter."""


def interpolated(x_BSD: Tensor, from_BS3: Tensor, to_BG3: Tensor, nearest: int = 3) -> Tensor:
    """At each fine point the mean over the nearest coarse ones, weighted with the inverse of their squared distances:
    [B G D] in the type of x. A fine point that is a coarse one has its features; of equal coarse points it is the mean.

    Args:
        from_BS3, to_BG3: where the coarse and the fine points are, without gradients.
        nearest: how many; with fewer coarse points some count more than once.
    """
    all_BS = torch.ones(from_BS3.shape[:2], dtype=torch.bool, device=from_BS3.device)
    near_BGk = nearest_points(to_BG3, from_BS3, all_BS, nearest)
    with torch.no_grad():
        near_BGk3 = at_places(wide(from_BS3), near_BGk.flatten(1)).unflatten(1, near_BGk.shape[1:])
        apart_BGk = (near_BGk3 - wide(to_BG3)[:, :, None]).square().sum(dim=3)
        tiny = torch.finfo(apart_BGk.dtype).tiny
        inverse_BGk = 1 / (apart_BGk / apart_BGk.amax(dim=2, keepdim=True).clamp_min(tiny) + LEAST)
        weight_BGk = (inverse_BGk / inverse_BGk.sum(dim=2, keepdim=True)).to(x_BSD.dtype)
    x_BGkD = at_places(x_BSD, near_BGk.flatten(1)).unflatten(1, near_BGk.shape[1:])
    return (x_BGkD * weight_BGk[..., None]).sum(dim=2)
