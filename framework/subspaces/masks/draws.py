"""Uniform numbers that are a function of (seed, step, name, place): the same on every rank and device, in any order of
calls, for a whole tensor or a part of it.

A counter-based generator: number i of a stream is the mixing function of splitmix64 at start + i * stride (Steele, Lea,
Flood, "Fast splittable pseudorandom number generators", 2014), where start and stride, an odd number, come from a hash
of (seed, step, name). All of it is 64-bit integer arithmetic, which every device does alike, and a rank that holds some
rows of a tensor draws these rows alone.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightspan.core.devices import has_values, widest_float

_AT_ONCE = 2**14  # numbers that a processor's caches hold; a GPU wants fewer and larger launches
_AT_ONCE_ON_GPU = 2**24
_TRANSITIONS = 24  # a stride needs as many changes between neighbouring bits, or close counters mix alike


def uniform(
    seed: int,
    step: int,
    name: str,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    within: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Independent uniform numbers [*shape] in the open interval (0, 1), symmetric about 1/2.

    They are multiples of 2^-24 (float32) or 2^-53 (float64) that are never 0 nor 1, so a logarithm of u or of 1 - u is
    finite; at most 16.7 in size in float32.

    Args:
        name: of the tensor: other names have other numbers.
        dtype: float32 or float64; half types are stored, not computed in. float32 where the device has no float64.
        within: shape of the whole tensor, of which `shape` at `offset` is a block; None for all of it.
        rows: int64 [shape[0]], which rows of a whole tensor of any length these are, such as samples of a data set.
    """
    assert dtype in (torch.float32, torch.float64), f"{dtype} is too narrow to draw in"
    device = torch.device(device)
    start, stride = _stream(seed, step, name)
    kept = 52 if dtype == torch.float64 and widest_float(device) == torch.float64 else 23
    drawn = torch.empty(tuple(shape), dtype=torch.float64 if kept == 52 else torch.float32, device=device)
    if not has_values(drawn):  # planned: only its shape counts
        return drawn
    flat, places = drawn.view(-1), _numbers(shape, within or shape, offset or [0] * len(shape), device, rows)
    at_once = _AT_ONCE if device.type == "cpu" else _AT_ONCE_ON_GPU
    for first in range(0, flat.numel(), at_once):
        part = flat[first : first + at_once]
        bits = _mixed(places(first, first + len(part)).mul_(_signed(stride)).add_(_signed(start)))
        part.copy_((bits >> (64 - kept)).bitwise_and_((1 << kept) - 1))  # the sign bit is shifted in from the left
    return drawn.add_(0.5).mul_(2.0**-kept)


def _stream(seed: int, step: int, name: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    start, stride = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big") | 1
    if (stride ^ stride >> 1).bit_count() < _TRANSITIONS:
        stride ^= 0xAAAAAAAAAAAAAAAA
    return start, stride


class _Places:
    """The numbers of a block's entries in the whole tensor, rows first."""

    def __init__(
        self, shape: Sequence[int], within: Sequence[int], offset: Sequence[int], device: torch.device
    ) -> None:
        self.device = device
        # Axes before the last one that is cut short run together with those behind it: a block of rows is one run.
        cut = max((axis for axis in range(len(shape)) if shape[axis] != within[axis]), default=0)
        self.run = math.prod(shape[cut:])
        self.first = sum(o * math.prod(within[axis + 1 :]) for axis, o in enumerate(offset))
        self.axes = [(shape[axis], math.prod(within[axis + 1 :])) for axis in range(cut)]

    def __call__(self, first: int, last: int) -> Tensor:
        """Of the block's entries `first` to `last`."""
        places = torch.arange(first, last, device=self.device)
        if not self.axes:
            return places.add_(self.first)
        rest, places = places // self.run, places % self.run + self.first
        for size, stride in reversed(self.axes):
            places += rest % size * stride
            rest = rest // size
        return places


def _numbers(
    shape: Sequence[int], within: Sequence[int], offset: Sequence[int], device: torch.device, rows: Tensor | None
) -> Callable[[int, int], Tensor]:
    """The numbers, in the whole tensor, of the entries `first` to `last` of a block or of rows."""
    if rows is None:
        return _Places(shape, within, offset, device)
    rows, width = rows.to(device, torch.int64), math.prod(shape[1:])

    def numbers(first: int, last: int) -> Tensor:
        places = torch.arange(first, last, device=device)
        return rows[places // width].mul_(width).add_(places.remainder_(width))

    return numbers


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser, in place, on int64 that stand for the unsigned integers of the same bits."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
