"""Pictures of many bands as colours: three bands, each stretched by itself.

Shapes: B samples, C bands, T dates, H W pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightspan.callbacks.pictures.in_range import quantiles, shown_in_range

STRETCH = [0.02, 0.98]
"""Shares of a band's valid values at which it is black and white."""
UNSEEN = 0.5  # grey in place of what is not valid


def coloured_dates(batch: Any, shown_bands: Sequence[int] | None) -> Tensor | None:
    """[B T 3 H W] in [0, 1] of a `MultispectralBatch` (T is 1) or a `MultispectralSeriesBatch`; None of others.

    Args:
        shown_bands: places of the bands that are red, green and blue; None takes the first three.
    """
    image = batch.get("image") if isinstance(batch, Mapping) else None
    valid = batch.get("valid") if isinstance(batch, Mapping) else None
    if not isinstance(image, Tensor) or not isinstance(valid, Tensor):
        return None
    if image.shape != valid.shape or image.ndim not in (4, 5) or not len(image):
        return None
    parts = [_three(part.detach().float().cpu(), shown_bands) for part in (image, valid)]
    image_BTCHW, seen_BTCHW = ((part if part.ndim == 5 else part.unsqueeze(2)).transpose(1, 2) for part in parts)
    valid_BTCHW = seen_BTCHW > 0
    bounds = band_bounds(image_BTCHW.flatten(0, 1), valid_BTCHW.flatten(0, 1))
    shown = shown_in_range(image_BTCHW.flatten(0, 1), bounds).unflatten(0, image_BTCHW.shape[:2])
    return torch.where(valid_BTCHW, shown, UNSEEN)


def band_bounds(image_BCHW: Tensor, valid_BCHW: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Black and white of each band, [C 1 1], by the values of its valid pixels; None takes all as valid."""
    valid_BCHW = torch.ones_like(image_BCHW, dtype=torch.bool) if valid_BCHW is None else valid_BCHW
    bands = zip(image_BCHW.unbind(1), valid_BCHW.unbind(1), strict=True)
    black_C, white_C = torch.stack([quantiles(band[seen], STRETCH) for band, seen in bands]).unbind(1)
    return black_C[:, None, None], white_C[:, None, None]


def chosen_bands(part_BC: Tensor, shown_bands: Sequence[int] | None) -> Tensor:
    """Three bands of pictures [B C ...] that have many; grey and coloured ones as they are, unless bands are chosen."""
    return part_BC if part_BC.shape[1] in (1, 3) and shown_bands is None else _three(part_BC, shown_bands)


def _three(part_BC: Tensor, shown_bands: Sequence[int] | None) -> Tensor:
    last = part_BC.shape[1] - 1
    return part_BC[:, [min(band, last) for band in (shown_bands or (0, 1, 2))]]
