"""Voxels in windows: cubes of some voxels a side, of which each holds those that are there.

Shapes: V voxels of all clouds, W windows, P pairs of a voxel and one of its window.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lightspan.core.devices import has_values
from lightspan.nn.voxels.grid import Voxels, voxels_at


class VoxelWindows(NamedTuple):
    """Each voxel in one window.

    Attributes:
        row_V: int64, the voxels window by window.
        counts_W: int64, of each window, at least 1.
        counts: the same on the host.
    """

    row_V: Tensor
    counts_W: Tensor
    counts: Sequence[int]


def windows_of(voxels: Voxels, side: int, shift: int = 0) -> VoxelWindows:
    """The voxels by windows of `side` voxels a side, of which one begins `shift` voxels before the origin of the
    coordinates. No two clouds share one.

    Args:
        shift: at most 15.
    """
    place_V3 = (voxels.place_V3 + shift).div(side, rounding_mode="floor")
    windows, window_V = voxels_at(place_V3, voxels.offsets, spread=side**2)  # of a surface
    counts_W = torch.zeros_like(windows.key_V).index_add(0, window_V, torch.ones_like(window_V))
    if has_values(counts_W):
        return VoxelWindows(window_V.argsort(stable=True), counts_W, counts_W.tolist())
    each, left = divmod(len(window_V), max(len(counts_W), 1))  # a plan, whose windows hold equally many
    return VoxelWindows(window_V, counts_W, [each + (window < left) for window in range(len(counts_W))])


def parts(windows: VoxelWindows, pairs: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Whole windows of at most so many pairs together, or one of more: their voxels, int64 [v], how many each of the
    windows has, and the number of pairs.
    """
    ends, held = [0], 0
    for window, count in enumerate(windows.counts):
        if held and held + count**2 > pairs:
            ends.append(window)
            held = 0
        held += count**2
    ends.append(len(windows.counts))
    first = 0
    for begin, end in pairwise(ends):
        counts = windows.counts[begin:end]
        last = first + sum(counts)
        yield windows.row_V[first:last], windows.counts_W[begin:end], sum(count**2 for count in counts)
        first = last


def pairs_of(counts_W: Tensor, voxels: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Every voxel with every one of its window, itself too: int64 [P] each, the first ascending.

    Args:
        counts_W: of each window, whose voxels follow one another.
        voxels, pairs: how many there are, which spares a question to the device.
    """
    device = counts_W.device
    first_W = counts_W.cumsum(0) - counts_W
    window_V = torch.arange(len(counts_W), device=device).repeat_interleave(counts_W, output_size=voxels)
    own_P = torch.arange(voxels, device=device).repeat_interleave(counts_W[window_V], output_size=pairs)
    begin_V = counts_W[window_V].cumsum(0) - counts_W[window_V]
    return own_P, torch.arange(pairs, device=device) - begin_V[own_P] + first_W[window_V[own_P]]
