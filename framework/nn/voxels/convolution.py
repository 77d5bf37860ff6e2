"""Convolutions of voxels: at each voxel the sum over those that are there, each times the weights of its step.

Nothing grows: a convolution gives features at known voxels alone, and reads what is missing as 0 (Graham et al., "3D
Semantic Segmentation with Submanifold Sparse Convolutional Networks", 2018, arXiv 1711.10275). Pairs of voxels are
found once, and serve all convolutions of a level: for each step of a kernel, its rows are gathered, multiplied and
added.
Shapes: V voxels, C coarser ones, P pairs of one step, K steps, I and O channels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightspan.core.devices import has_values, wide_type
from lightspan.core.errors import UserError
from lightspan.nn.voxels.grid import Voxels, neighbours

MOST_STEPS = 15  # from the middle of a kernel, see `lightspan.nn.voxels.grid`


class VoxelPairs(NamedTuple):
    """Which voxels a convolution joins.

    Attributes:
        to_P, from_P: one a step, int64: rows of what it gives and of what it reads. A row is in each `to` once at most.
        rows: of what it gives.
        sources: rows that it reads.
    """

    to_P: tuple[Tensor, ...]
    from_P: tuple[Tensor, ...]
    rows: int
    sources: int

    def turned(self) -> "VoxelPairs":
        """Of the convolution the other way round."""
        return VoxelPairs(self.from_P, self.to_P, self.sources, self.rows)


def cube_steps(side: int, device: torch.device) -> Tensor:
    """All places of a cube, int64 [side^3, 3], z fastest as in the weights of a dense convolution."""
    axis = torch.arange(side, device=device)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).flatten(0, 2)


def around(voxels: Voxels, kernel: int) -> VoxelPairs:
    """Each voxel with those in the cube of `kernel` a side about it.

    Raises: UserError for a side that is even or above 31.
    """
    if kernel % 2 == 0 or not 1 <= kernel <= 2 * MOST_STEPS + 1:
        raise UserError(f"kernel={kernel} must be odd, and at most {2 * MOST_STEPS + 1}")
    found_KV = neighbours(voxels, cube_steps(kernel, voxels.key_V.device) - kernel // 2)
    to_P, from_P = [], []
    for found_V in found_KV:
        to_P.append(_where(found_V >= 0))
        from_P.append(found_V[to_P[-1]])
    rows = len(voxels.key_V)
    return VoxelPairs(tuple(to_P), tuple(from_P), rows, rows)


def inside(voxels: Voxels, parent_V: Tensor, parents: int, stride: int) -> VoxelPairs:
    """Each coarser voxel with those that lie in it; `turned`, each voxel with the coarser one.

    Args:
        parent_V, parents: which lies in which, and how many of them there are, see `lightspan.nn.voxels.grid.coarser`.
    """
    place_V3 = voxels.place_V3.remainder(stride)
    step_V = (place_V3[:, 0] * stride + place_V3[:, 1]) * stride + place_V3[:, 2]
    from_P = tuple(_where(step_V == step) for step in range(stride**3))
    return VoxelPairs(tuple(parent_V[at_P] for at_P in from_P), from_P, parents, len(voxels.key_V))


def _where(there_V: Tensor) -> Tensor:
    """The rows at which something holds, int64; in a plan all."""
    return there_V.nonzero()[:, 0] if has_values(there_V) else torch.arange(len(there_V), device=there_V.device)


class VoxelConv(nn.Module):
    """Features of voxels [V I] and their pairs -> [rows O], summed in float32 or wider.

    At voxels that are there it equals the dense convolution with the same weights: of `around`, with padding of half a
    kernel; of `inside`, with a kernel and steps of `stride`. Of pairs that are `turned` it equals the transposed one,
    whose weights have their first axes swapped.

    Args:
        kernel: its side.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, bias: bool = False) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel = in_channels, out_channels, kernel
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as torch's convolutions begin
        if self.bias is not None:
            bound = 1 / math.sqrt(max(in_channels * kernel**3, 1))
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x_VI: Tensor, pairs: VoxelPairs) -> Tensor:
        wide = wide_type(x_VI.dtype)
        out_VO, given = x_VI.new_zeros(pairs.rows, self.out_channels, dtype=wide), x_VI.dtype
        for weight_OI, to_P, from_P in zip(self.weight.flatten(2).unbind(2), pairs.to_P, pairs.from_P, strict=True):
            part_PO = x_VI.index_select(0, from_P) @ weight_OI.T
            out_VO.index_add_(0, to_P, part_PO.to(wide))
            given = part_PO.dtype
        return (out_VO if self.bias is None else out_VO + self.bias).to(given)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel={self.kernel}, bias={self.bias is not None}"
