"""Positions of a grid of 1 to 3 axes, as fixed tables: added to tokens, or by turning queries and keys. And learned
ones of two axes.

Each axis gets an equal share of the channels. The last axis (x) has the first share, as in MAE's code; exchanged, the
codes are the same but weights are not.
Shapes: T places, counted row by row, w width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightspan.core.devices import widest_float
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


class RowsAndColumns(nn.Module):
    """Learned positions of a grid that are the sum of a code of the row and one of the column: [H*W w], of a rank of at
    most H + W - 1.

    Source: Trinh et al., "Selfie", 2019, arXiv 1906.02940, section 2.4. Codes start at N(0, 0.02^2).

    Args:
        grid: (H, W), each at least 1.
        width: w.
    """

    parameter_kinds = {"row_Hw": "embeddings", "column_Ww": "embeddings"}  # noqa: RUF012 - read by lightspan.optim.groups

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        if min(*grid, width) < 1:
            raise UserError(
                f"positions of width {width} on a grid of {' x '.join(map(str, grid))}: each must be above 0"
            )
        self.row_Hw, self.column_Ww = (nn.Parameter(0.02 * torch.randn(side, width)) for side in grid)

    def forward(self) -> Tensor:
        return (self.row_Hw[:, None] + self.column_Ww).flatten(0, 1)


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
