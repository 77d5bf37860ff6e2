"""Positions of a grid of any number of axes: fixed tables, added to tokens or by turning queries and keys, and learned
ones.

Each axis gets an equal share of the channels. The last axis (x) has the first share, as in MAE's code; exchanged, the
codes are the same but weights are not.
Shapes: T places, counted row by row, w width.
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.devices import wide, widest_float
from lightspan.core.errors import UserError


def sincos(
    grid: Sequence[int], width: int, prefix: int = 0, base: float = 10_000.0, device: torch.device | str = "cpu"
) -> Tensor:
    """Sines, then cosines, of place times base^(-2i/s) for i < s/2, on each axis' share s: float32 [prefix+T w].

    Source: Vaswani et al., 2017, arXiv 1706.03762, section 3.5; on two axes He et al., "MAE", 2021, arXiv 2111.06377.

    Args:
        prefix: tokens without a position, before all others: rows of zeros.
        base: > 1.
    Raises: UserError for a width that is not a multiple of 2 * axes.
    """
    angles_TAf = _angles(grid, width, base, torch.device(device))
    table = torch.cat([angles_TAf.sin(), angles_TAf.cos()], dim=2).flatten(1).float()
    return torch.cat([table.new_zeros(prefix, width), table])


def sincos_by_axis(
    grid: Sequence[int], widths: Sequence[int], prefix: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """As `sincos`, with a number of channels for each axis: float32 [prefix+T sum of widths], the last axis first.

    Source: of time, height and width Jakubik et al., "Prithvi", 2023, arXiv 2310.18660, and its code; of a group of
    bands beside two axes Cong et al., "SatMAE", 2022, arXiv 2207.08051.

    Args:
        widths: channels of each axis in the grid's order, each a multiple of 2; an axis with 0 leaves no trace.
    Raises: UserError for other widths, or another number of them.
    """
    if len(widths) != len(grid) or min(widths) < 0 or not sum(widths):
        raise UserError(f"positions of {len(grid)} axes need as many widths, of which one is above 0, not {[*widths]}")
    parts, count, before = [], math.prod(grid), 1
    for side, width in zip(grid, widths, strict=True):
        if width:
            code_sw = sincos((side,), width, device=device)
            # Row by row: a place along this axis is repeated for each place of the axes behind it.
            parts.append(code_sw.repeat_interleave(count // (before * side), dim=0).repeat(before, 1))
        before *= side
    table = torch.cat(parts[::-1], dim=1)
    return torch.cat([table.new_zeros(prefix, table.shape[1]), table])


def rotary(grid: Sequence[int], width: int, base: float = 10_000.0, device: torch.device | str = "cpu") -> Tensor:
    """Sines and cosines by which channels 2i and 2i+1 of a head are turned: float32 [T 2 width], sines first.

    `timm.layers.apply_rot_embed_cat(x, table)` turns queries and keys [... T width], and timm's attention with rotary
    positions takes the table as `rope`. A product of a turned query and a turned key depends on the difference of their
    places alone.
    Source: Su et al., "RoFormer", 2021, arXiv 2104.09864; shared among axes as in CroCo v2, 2022, arXiv 2211.10408,
    whose base is 100.

    Args:
        width: of one attention head.
    Raises: UserError for a width that is not a multiple of 2 * axes.
    """
    angles_Tf = _angles(grid, width, base, torch.device(device)).flatten(1).repeat_interleave(2, dim=1)
    return torch.cat([angles_Tf.sin(), angles_Tf.cos()], dim=1).float()


class LearnedPositions(nn.Module):
    """A learned code of each place of a grid, and by `resampled` of any other grid with as many axes: [T w]. Codes
    start at N(0, 0.02^2).

    Args:
        grid: places along each axis, each at least 1.
        width: w.
    """

    parameter_kinds = {"code_Tw": "embeddings"}  # noqa: RUF012 - read by lightspan.optim.groups

    def __init__(self, grid: Sequence[int], width: int) -> None:
        super().__init__()
        _require_grid(grid, width)
        self.grid, self.code_Tw = tuple(grid), nn.Parameter(0.02 * torch.randn(math.prod(grid), width))

    def forward(self, grid: Sequence[int]) -> Tensor:
        """Raises: UserError for a grid with another number of axes."""
        return resampled(self.code_Tw, self.grid, grid)


class SummedPositions(nn.Module):
    """Learned positions of a grid that are the sum of a code for each axis, of the row and of the column on two: [T w],
    of a rank of at most 1 + the sum over axes of (places - 1).

    Source: Trinh et al., "Selfie", 2019, arXiv 1906.02940, section 2.4. Codes start at N(0, 0.02^2).

    Args:
        grid: places along each axis, each at least 1.
        width: w.
    """

    def __init__(self, grid: Sequence[int], width: int) -> None:
        super().__init__()
        _require_grid(grid, width)
        self.axes = nn.ParameterList(0.02 * torch.randn(side, width) for side in grid)
        # Read by lightspan.optim.groups.
        self.axes.parameter_kinds = {str(axis): "embeddings" for axis in range(len(grid))}  # type: ignore[assignment]

    def forward(self) -> Tensor:
        table = reduce(lambda before, code_sw: before[..., None, :] + code_sw, self.axes)
        return table.flatten(0, -2)


def resampled(code_Tw: Tensor, grid: Sequence[int], other: Sequence[int]) -> Tensor:
    """Codes of a grid for the places of another one that covers the same sample, [T' w] in their own type.

    Along each axis by itself, the last one first, they are interpolated by cubic splines (with antialiasing where there
    are fewer places), in float32 or wider. On two axes it is what timm's `resample_abs_pos_embed` does.

    Raises: UserError for another number of axes, or codes of another number of places.
    """
    if len(grid) != len(other) or math.prod(grid) != len(code_Tw) or min(other) < 1:
        raise UserError(
            f"{len(code_Tw)} positions, learned on a grid of {' x '.join(map(str, grid))}, cannot be interpolated on "
            f"one of {' x '.join(map(str, other))}: it must have as many axes, each with at least 1 place"
        )
    if (*grid,) == (*other,):
        return code_Tw
    map_w = wide(code_Tw).T.unflatten(1, tuple(grid))
    for axis in range(len(grid), 0, -1):
        lines = map_w.movedim(axis, -1)
        # torch's cubic interpolation is that of images: each line is one of a single row.
        rows_1N1s = lines.reshape(1, -1, 1, lines.shape[-1])
        rows_1N1s = F.interpolate(rows_1N1s, (1, other[axis - 1]), mode="bicubic", antialias=True)
        map_w = rows_1N1s.reshape(*lines.shape[:-1], -1).movedim(-1, axis)
    return map_w.flatten(1).T.to(code_Tw.dtype)


def _require_grid(grid: Sequence[int], width: int) -> None:
    if not grid or min(*grid, width) < 1:
        raise UserError(
            f"positions of width {width} on a grid of {' x '.join(map(str, grid)) or 'no axis'}: each must be above 0"
        )


def _angles(grid: Sequence[int], width: int, base: float, device: torch.device) -> Tensor:
    """[T axes f]: place times frequency, of f = width / (2 axes) frequencies; the last axis first."""
    axes = len(grid)
    if not axes or min(grid) < 1 or width < 1 or width % (2 * axes):
        raise UserError(
            f"positions of width {width} on a grid of {' x '.join(map(str, grid)) or 'no axis'}: sines and cosines of "
            f"{axes} axes need a width that is a multiple of {2 * axes}, and every side at least 1"
        )
    wide = widest_float(device)
    share = width // axes
    rates_f = torch.exp(torch.arange(0, share, 2, dtype=wide, device=device) * (-math.log(base) / share))
    lines = [torch.arange(side, dtype=wide, device=device) for side in grid]
    places_TA = torch.stack(torch.meshgrid(*lines, indexing="ij")[::-1], dim=-1).flatten(0, -2)
    return places_TA[..., None] * rates_f
