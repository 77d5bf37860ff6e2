"""Random numbers by hashing: functions of a seed and a place, the same on every device, with no generator to set; and
what makes noise smooth.

Source: the last steps of SplitMix64 (Steele, Lea and Flood, 2014), and Box and Muller's normal numbers.
Shapes: B rows.
"""

import functools

import numpy as np
import torch
from torch import Tensor


def hashed_noise(seed_B: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32 [B, *shape]: a function of (seed, stream, place), the same on every device.

    A generator would have to be set anew for each row, on the host. Two times 24 bits of a hash make a number.

    Args:
        seed_B: int64.
        stream: tells several noises of one seed apart, such as those of its views.
    """
    first, second = _uniforms(seed_B, stream, torch.Size(shape).numel())
    normal = (-2 * (1 - first).log()).sqrt() * (2 * torch.pi * second).cos()
    return normal.view(len(seed_B), *shape)


def hashed_uniform(seed_B: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [0, 1), multiples of 2^-24, float32 [B, *shape]: functions as those of `hashed_noise`."""
    return _uniforms(seed_B, stream, torch.Size(shape).numel())[0].view(len(seed_B), *shape)


def mixed_seed(number_B: Tensor, *others: int) -> Tensor:
    """A seed, int64 [B], for each number, int64 [B], together with others that are the same for all, in this order."""
    for other in others:
        number_B = _hashed(number_B) + other
    return number_B


def _uniforms(seed_B: Tensor, stream: int, count: int) -> tuple[Tensor, Tensor]:
    """Two numbers in [0, 1) for each place, float32 [B count]."""
    place = torch.arange(count, device=seed_B.device) + stream * count
    # Seeds are hashed first, so that neighbouring ones do not meet at neighbouring places.
    bits = _hashed(_hashed(seed_B)[:, None] + place)
    first, second = ((bits >> shift & 0xFFFFFF).float() / 2**24 for shift in (40, 8))
    return first, second


def _hashed(x: Tensor) -> Tensor:
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)


@functools.cache
def interpolation(side: int, points: int) -> np.ndarray:
    """float64 [side points], by which noise at points of equal distances becomes smooth: linear interpolation for the
    middles of `side` pixels, of which the first and the last point are the outer edges.
    """
    at = (np.arange(side) + 0.5) / side * (points - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(points)), 0)
