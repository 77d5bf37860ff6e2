"""Swin3D: a transformer with shifted windows on the voxels of point clouds, and a contextual relative encoding.

Source: Yang et al., "Swin3D: A Pretrained Transformer Backbone for 3D Indoor Scene Understanding", 2023, arXiv
2304.06906, section 3, and its code, microsoft/Swin3D. A voxel has the place, colour and normal of one of its points.
The encoding (`lightspan.nn.voxels.context`) sees how these differ between the voxels of a window. Windows are fixed
to the grid of the coordinates, and every second block has them moved by half a side; nothing is rolled or masked.
As in the code: a voxel's branches are dropped by themselves, blocks on the way up have a share of 0.1, and the norm of
what pools comes before its linear layer.
Shapes: V voxels, C coarser ones, D width, h heads.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.row_norm import RowNorm
from lightspan.nn.stochastic_depth import drop_paths
from lightspan.nn.voxels.context import ContextAxis, context_attention
from lightspan.nn.voxels.convolution import VoxelConv, around
from lightspan.nn.voxels.levels import Level, coarser_level
from lightspan.nn.voxels.nearest import interpolated, largest_near, nearest_rows
from lightspan.nn.voxels.windows import VoxelWindows, windows_of

# A recipe may name the classes listed here.
__all__ = ["Swin3D", "Swin3DEncoder"]

SIGNAL_REACH = 2.0  # how much two signals in [-1, 1] can differ
UP_DROP_PATH = 0.1


class ContextTables(nn.ParameterList):
    """A table for each signal, [3 2L h d] of its axes, as initialised in the code."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__(nn.init.trunc_normal_(torch.empty(shape), std=0.02) for shape in shapes)
        self.parameter_kinds = {str(signal): "embeddings" for signal in range(len(shapes))}


class ContextAttention(nn.Module):
    """Attention among the voxels of a window, [V D] -> the same.

    Args:
        width, heads: width a multiple of heads.
        window: M, voxels of a side.
        steps: rows of a table for the side of a voxel; for a signal in [-1, 1] twice as many are a difference of 1.
        signals: of a level that are encoded besides places, its first ones.
    """

    def __init__(self, width: int, heads: int, window: int, steps: int, signals: int) -> None:
        super().__init__()
        self.heads, self.steps = heads, [float(steps), *[2.0 * steps] * signals]
        reach = [steps * window, *[int(2 * steps * SIGNAL_REACH)] * signals]
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        shapes = [(3, 2 * L, heads, width // heads) for L in reach]
        self.query, self.key, self.value = ContextTables(shapes), ContextTables(shapes), ContextTables(shapes)

    def forward(self, x_VD: Tensor, level: Level, windows: VoxelWindows) -> Tensor:
        q, k, v = self.qkv(x_VD).unflatten(1, (3, self.heads, -1)).unbind(1)
        known = (level.xyz_V3, *level.signals)
        tables = zip(known, self.steps, self.query, self.key, self.value, strict=False)
        axes = [
            ContextAxis(signal[:, axis], steps, query[axis], key[axis], value[axis])
            for signal, steps, query, key, value in tables
            for axis in range(3)
        ]
        return self.proj(context_attention(q, k, v, axes, windows).flatten(1).to(x_VD.dtype))


class VoxelBlock(nn.Module):
    """Attention and an MLP, each after a norm and beside the identity: [V D] -> the same."""

    def __init__(self, width: int, heads: int, window: int, steps: int, signals: int, drop_path: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = ContextAttention(width, heads, window, steps, signals)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop_path = drop_path

    def forward(self, x_VD: Tensor, level: Level, windows: VoxelWindows) -> Tensor:
        x_VD = x_VD + self.drop_path(self.attn(self.norm1(x_VD), level, windows))
        return x_VD + self.drop_path(self.mlp(self.norm2(x_VD)))


class VoxelStage(nn.Module):
    """Blocks of one level, of which every second one has its windows moved by half a side: [V D] -> the same."""

    def __init__(
        self, width: int, heads: int, window: int, steps: int, signals: int, drops: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(VoxelBlock(width, heads, window, steps, signals, drop) for drop in drops)

    def forward(self, x_VD: Tensor, level: Level) -> Tensor:
        shifts = (0, self.window // 2)[: len(self.blocks)]
        windows = [windows_of(level.voxels, self.window, shift) for shift in shifts]
        for at, block in enumerate(self.blocks):
            x_VD = block(x_VD, level, windows[at % 2])
        return x_VD


class NearestPooling(nn.Module):
    """The largest over the voxels nearest to each coarser one, after a norm and a linear layer: [V D] -> [C out]."""

    def __init__(self, width: int, out_features: int, neighbours: int) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, out_features, bias=False)

    def forward(self, x_VD: Tensor, fine: Level, coarse: Level, stride: int) -> Tensor:
        asking = (coarse.xyz_V3 * stride, coarse.voxels.offsets)
        near_CK, _ = nearest_rows(*asking, fine.xyz_V3, fine.voxels.offsets, self.neighbours)
        return largest_near(self.linear(self.norm(x_VD)), near_CK)


class Swin3DEncoder(nn.Module):
    """A level of voxels -> the levels of all stages, the finest first, and their features.

    Fine-tuning keeps this part: what divides voxels again and the classifier begin anew.

    Args:
        signals: of a level, that enter the network: 1 for colours, 2 for normals too.
        encoded: how many of them the encoding sees, the first ones; None is all.
        widths, depths, heads: of the stages: D, blocks, and heads, which divide D.
        windows: M, voxels of a window's side, in each stage, at most 31.
        strides: of the way from each stage to the next.
        steps: rows of the tables for the side of a voxel.
        neighbours: voxels of which a coarser one takes the largest.
        drop_path: share of dropped branches in the last block, rising evenly from 0 in the first.
    Raises: UserError for settings that do not fit.
    """

    def __init__(
        self,
        signals: int = 1,
        encoded: int | None = None,
        widths: Sequence[int] = (48, 96, 192, 384, 384),
        depths: Sequence[int] = (2, 4, 9, 4, 4),
        heads: Sequence[int] = (6, 6, 12, 24, 24),
        windows: Sequence[int] = (5, 7, 7, 7, 7),
        strides: Sequence[int] = (3, 2, 2, 2),
        steps: int = 4,
        neighbours: int = 16,
        drop_path: float = 0.3,
    ) -> None:
        super().__init__()
        numbers = {"widths": widths, "depths": depths, "heads": heads, "windows": windows}
        if not widths or {*map(len, numbers.values())} != {len(strides) + 1}:
            shown = ", ".join(f"{name}={[*each]}" for name, each in numbers.items())
            raise UserError(
                f"Swin3DEncoder: {shown} must have a number for each stage, and strides={[*strides]} one less"
            )
        require_in("[1, inf)", **numbers, steps=steps, neighbours=neighbours)
        require_in("[1, 31]", windows=windows)
        require_in("[2, inf)", strides=strides)
        require_in("[0, inf)", signals=signals)
        require_in(f"[0, {signals}]", encoded=encoded)
        for width, count in zip(widths, heads, strict=True):
            if width % count:
                raise UserError(f"Swin3DEncoder: a width of {width} is no multiple of its heads={count}")
        self.widths, self.heads, self.windows = [*widths], [*heads], [*windows]
        self.strides, self.steps, self.signals = [*strides], steps, signals
        self.encoded = signals if encoded is None else encoded
        self.stem, self.stem_norm = VoxelConv(3 + 3 * signals, widths[0], 3), RowNorm(widths[0])
        drops, first = drop_paths(drop_path, sum(depths), "Swin3DEncoder"), 0
        self.stages = nn.ModuleList()
        for width, depth, count, window in zip(widths, depths, heads, windows, strict=True):
            of_stage = drops[first : first + depth]
            self.stages.append(VoxelStage(width, count, window, steps, self.encoded, of_stage))
            first += depth
        self.pools = nn.ModuleList(NearestPooling(width, wider, neighbours) for width, wider in pairwise(widths))
        _initialise(self)

    def forward(self, level: Level) -> tuple[list[Level], list[Tensor]]:
        if len(level.signals) != self.signals:
            raise UserError(
                f"Swin3DEncoder: signals={self.signals}, and points come with {len(level.signals)} besides their "
                "places; set it to the number of the fields"
            )
        inputs_VI = level.inputs.to(self.stem.weight.dtype)
        x_VD = F.relu(self.stem_norm(self.stem(inputs_VI, around(level.voxels, 3))))
        levels, features = [level], [self.stages[0](x_VD, level)]
        for stage, pool, stride in zip(self.stages[1:], self.pools, self.strides, strict=True):
            coarse, _ = coarser_level(levels[-1], stride)
            x_VD = pool(features[-1], levels[-1], coarse, stride)
            levels.append(coarse)
            features.append(stage(x_VD, coarse))
        return levels, features


class Upsampling(nn.Module):
    """[C width] of a coarser level and [V out] of a finer one -> [V out]: what the three nearest voxels have, by the
    inverse of their distance, and what is known here, each after a norm and a linear layer.
    """

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.coarse = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out_features))
        self.fine = nn.Sequential(nn.LayerNorm(out_features), nn.Linear(out_features, out_features))

    def forward(self, x_CD: Tensor, own_VD: Tensor, coarse: Level, fine: Level, stride: int) -> Tensor:
        known = coarse.xyz_V3 * stride
        near, there = nearest_rows(fine.xyz_V3, fine.voxels.offsets, known, coarse.voxels.offsets, 3)
        return self.fine(own_VD) + interpolated(self.coarse(x_CD), known, fine.xyz_V3, near, there)


class Swin3D(nn.Module):
    """A level of voxels -> features of each, [V num_features]: those of the finest stage, after all coarser ones.

    Args:
        encoder: a `Swin3DEncoder`, as it is made or with the weights of an earlier run
            (`lightspan.backbones.weights.with_weights`).
        blocks_up: blocks after each step up, as wide as those of the stage.
    Raises: UserError for another encoder.
    """

    def __init__(self, encoder: nn.Module, blocks_up: int = 0) -> None:
        super().__init__()
        if not isinstance(encoder, Swin3DEncoder):
            raise UserError(f"Swin3D: encoder={type(encoder).__name__} must be a Swin3DEncoder")
        require_in("[0, inf)", blocks_up=blocks_up)
        self.encoder, self.num_features = encoder, encoder.widths[0]
        down = [*zip(encoder.widths, encoder.heads, encoder.windows, strict=True)][:-1]
        self.ups = nn.ModuleList(
            Upsampling(wider, width) for (width, *_), wider in zip(down, encoder.widths[1:], strict=True)
        )
        self.up_stages = nn.ModuleList(
            VoxelStage(*sizes, encoder.steps, encoder.encoded, [DropPath(UP_DROP_PATH) for _ in range(blocks_up)])
            for sizes in down
        )
        _initialise(self.ups)
        _initialise(self.up_stages)

    def forward(self, level: Level) -> Tensor:
        levels, features = self.encoder(level)
        x_VD = features[-1]
        for at in range(len(self.ups) - 1, -1, -1):
            stride = self.encoder.strides[at]
            x_VD = self.ups[at](x_VD, features[at], levels[at + 1], levels[at], stride)
            x_VD = self.up_stages[at](x_VD, levels[at])
        return x_VD


def _initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias) if layer.bias is not None else None
