"""Standardised pictures as they are shown."""

import torch
from torch import Tensor

NEARLY_ALL = [0.005, 0.995]  # the least and the largest value but for some
MOST_VALUES = 2**20  # for quantiles: torch sorts no more than 2^24


def shown_in_range(images_BCHW: Tensor, bounds: tuple[Tensor, Tensor] | None) -> Tensor:
    """Float pictures in [0, 1] on the CPU; NaN is black.

    Args:
        bounds: black and white, each [C, 1, 1], as a data module's `bounds`. None takes the range of nearly all values:
            a single extreme pixel would leave the rest of the picture grey.
    """
    shown_BCHW = images_BCHW.float().cpu()
    black, white = bounds or quantiles(shown_BCHW, NEARLY_ALL)
    return ((shown_BCHW - black) / (white - black).clamp_min(1e-5)).clamp(0, 1).nan_to_num()


def quantiles(values: Tensor, at: list[float]) -> Tensor:
    """Of the finite values, 0 if there are none; of evenly spaced ones if there are more than torch can sort."""
    finite = values[values.isfinite()]
    if not len(finite):
        return torch.zeros(len(at))
    return finite[:: 1 + len(finite) // MOST_VALUES].quantile(torch.tensor(at))
