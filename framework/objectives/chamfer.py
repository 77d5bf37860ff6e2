"""Chamfer distance between sets of points.

Source: Fan, Su, Guibas, "A Point Set Generation Network", 2017, arXiv 1612.00603, section 4.2.
Shapes: S pairs of sets, K points of one set, L of the other, three coordinates.
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.objectives.means import known_mean


def chamfer_squared(a_SK3: Tensor, b_SL3: Tensor) -> Tensor:
    """The mean over a of the squared distance to the nearest point of b, plus that over b to a: [S], at least 0, in
    float32 or wider and in the square of the coordinates' unit (Chamfer-L2).

    Of several nearest points one gets the gradient.

    Raises: UserError for a set without points, or sets that are not as many.
    """
    if a_SK3.shape[0] != b_SL3.shape[0] or 0 in (a_SK3.shape[1], b_SL3.shape[1]):
        raise UserError(
            f"sets of points {[*a_SK3.shape]} and {[*b_SL3.shape]} have no distance: there must be as many of both, "
            "each with a point"
        )
    a_SK3, b_SL3 = wide(a_SK3), wide(b_SL3)
    with torch.no_grad():  # what is kept for the gradient grows with K + L, not with their product
        apart_SKL = sum(
            ((a_SK3[:, :, None, axis] - b_SL3[:, None, :, axis]).square() for axis in range(a_SK3.shape[2])),
            torch.zeros((), device=a_SK3.device, dtype=a_SK3.dtype),
        )
        to_b_SK, to_a_SL = apart_SKL.argmin(dim=2), apart_SKL.argmin(dim=1)
    return _mean_to(a_SK3, b_SL3, to_b_SK) + _mean_to(b_SL3, a_SK3, to_a_SL)


def chamfer_loss(guess_SK3: Tensor, points_SL3: Tensor, known_S: Tensor) -> Tensor:
    """The mean of `chamfer_squared` over the known pairs of all ranks, a scalar; 0, with gradient 0, without any.

    Args:
        known_S: bool; other pairs may hold anything.
    """
    return known_mean(chamfer_squared(guess_SK3, points_SL3), known_S)


def _mean_to(from_SK3: Tensor, to_SL3: Tensor, at_SK: Tensor) -> Tensor:
    nearest_SK3 = to_SL3.gather(1, at_SK[..., None].expand(-1, -1, to_SL3.shape[2]))
    return (from_SK3 - nearest_SK3).square().sum(dim=2).mean(dim=1)
