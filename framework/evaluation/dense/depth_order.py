"""Which of two patches is nearer? Shapes: N images, P patches of each."""

import torch
from torch import Tensor

from lightspan.evaluation.dense.patches import fitted, pixels_of_patches


def depth_of_patches(depth_Nhw: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Mean depth of each patch, float64 [N P], over its pixels whose depth is known: finite and above 0, as sensors
    write. NaN where none is.
    """
    pixels_NPd = pixels_of_patches(fitted(depth_Nhw, grid), grid).double()
    known_NPd = pixels_NPd.isfinite() & (pixels_NPd > 0)
    return torch.where(known_NPd, pixels_NPd, 0.0).sum(dim=2) / known_NPd.sum(dim=2)


def order_agreement(predicted_NP: Tensor, depth_NP: Tensor) -> tuple[Tensor, Tensor]:
    """(share of pairs of an image's patches that are ordered as they lie, number of pairs), float64 [N].

    Pairs of equal or unknown (NaN) depth do not count; equal predictions count half. The share is 0 where no pair
    counts.
    """
    shares, pairs = [], []
    for predicted_P, depth_P in zip(predicted_NP.double(), depth_NP, strict=True):
        known_P = ~depth_P.isnan()
        first, second = torch.combinations(torch.arange(int(known_P.sum()), device=depth_P.device)).unbind(1)
        gap, guessed = ((x[known_P][first] - x[known_P][second]).sign() for x in (depth_P, predicted_P))
        pairs.append((gap != 0).sum().double())
        shares.append(((1 + gap * guessed) / 2 * (gap != 0)).sum() / pairs[-1].clamp_min(1))
    empty = depth_NP.new_zeros(0)
    return torch.stack(shares) if shares else empty, torch.stack(pairs) if pairs else empty
