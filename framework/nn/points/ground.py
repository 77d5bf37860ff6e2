"""Fields of features over the ground, what they are at points, and how they move with the points.

A field [C H W] covers the square [-reach, reach]^2: its rows lie along y, its columns along x, and its values belong to
the middles of cells. A move T takes a point to T x and a field F to (W_T F)(y) = F(T^-1 y), so that W_S W_T = W_ST, and
W_T F at T x is F at x: exactly for mirrors, quarter turns and shifts by whole cells, as far as cells stay inside.
An encoder f is equivariant if f(T X) = W_T f(X) (E-SSL3D, arXiv 2404.11737).
Shapes: B clouds, N points of all, C channels, H W cells.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightspan.core.devices import wide, widest_float
from lightspan.core.noise import hashed_uniform
from lightspan.core.ranges import require_in


class GroundMoves(NamedTuple):
    """x -> matrix x + shift along the ground, and z -> lift z; one of each cloud.

    Attributes:
        matrix_B22: invertible: turns, mirrors, scales. shift_B2: in the unit of points. lift_B: above 0.
    """

    matrix_B22: Tensor
    shift_B2: Tensor
    lift_B: Tensor

    def ground(self, xy_N2: Tensor, cloud_N: Tensor) -> Tensor:
        """Where places on the ground come to lie, [N 2], in the type of the moves or wider."""
        kind = torch.promote_types(xy_N2.dtype, self.matrix_B22.dtype)
        turned_N2 = (self.matrix_B22[cloud_N].to(kind) @ xy_N2[..., None].to(kind))[..., 0]
        return turned_N2 + self.shift_B2[cloud_N]

    def points(self, xyz_N3: Tensor, cloud_N: Tensor) -> Tensor:
        """Where points come to lie, [N 3] in their type.

        Args:
            cloud_N: to which cloud each belongs, int64.
        """
        up_N1 = self.lift_B[cloud_N, None] * xyz_N3[:, 2:]
        return torch.cat([self.ground(xyz_N3[:, :2], cloud_N), up_N1], dim=1).to(xyz_N3.dtype)

    def after(self, first: "GroundMoves") -> "GroundMoves":
        """These moves made after others."""
        shift_B2 = (self.matrix_B22 @ first.shift_B2[..., None])[..., 0] + self.shift_B2
        return GroundMoves(self.matrix_B22 @ first.matrix_B22, shift_B2, self.lift_B * first.lift_B)

    def inverse(self) -> "GroundMoves":
        (a_B, b_B), (c_B, d_B) = (row.unbind(1) for row in self.matrix_B22.unbind(1))
        rows = torch.stack([d_B, -b_B, -c_B, a_B], dim=1).unflatten(1, (2, 2))
        back_B22 = rows / (a_B * d_B - b_B * c_B)[:, None, None]
        return GroundMoves(back_B22, -(back_B22 @ self.shift_B2[..., None])[..., 0], 1 / self.lift_B)


def turned_by(share_B: Tensor) -> GroundMoves:
    """Turns from x to y by shares of a whole one, float [B]; quarters are exact."""
    quarter_B = (4 * share_B).round()
    rest_B = (4 * share_B - quarter_B) * (torch.pi / 2)
    ways_42 = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]], device=share_B.device, dtype=share_B.dtype)
    cos_B, sin_B = ways_42[quarter_B.long() % 4].unbind(1)
    cos_B, sin_B = rest_B.cos() * cos_B - rest_B.sin() * sin_B, rest_B.sin() * cos_B + rest_B.cos() * sin_B
    matrix_B22 = torch.stack([cos_B, -sin_B, sin_B, cos_B], dim=1).unflatten(1, (2, 2))
    return GroundMoves(matrix_B22, torch.zeros_like(matrix_B22[:, 0]), torch.ones_like(cos_B))


@dataclass(frozen=True)
class GroundGroup:
    """How clouds are shifted, scaled and mirrored; turns are `turned_by`.

    Args:
        shift: along x and along y each uniform in [-shift, shift], in the unit of points; >= 0.
        scale: factors are uniform between these, each above 0.
        flip: probability that y is mirrored, in [0, 1].
    Raises: UserError for settings outside of these.
    """

    shift: float = 2.0
    scale: tuple[float, float] = (0.9, 1.1)
    flip: float = 0.5

    def __post_init__(self) -> None:
        require_in("[0, inf)", shift=self.shift)
        require_in("(0, inf)", scale=self.scale)
        require_in("[0, 1]", flip=self.flip)

    def drawn(self, seed_B: Tensor) -> GroundMoves:
        """A move of each cloud, float32, a function of its seed, int64 [B]."""
        low, high = self.scale
        x_B, y_B, size_B, side_B = hashed_uniform(seed_B, 0, (4,)).unbind(1)
        scale_B, side_B = torch.lerp(low + 0 * size_B, high + 0 * size_B, size_B), 1 - 2 * (side_B < self.flip).float()
        matrix_B22 = torch.diag_embed(torch.stack([scale_B, side_B * scale_B], dim=1))
        return GroundMoves(matrix_B22, self.shift * (2 * torch.stack([x_B, y_B], dim=1) - 1), scale_B)


def inside(xyz_N3: Tensor, reach: float) -> Tensor:
    """Whether points lie over the square [-reach, reach)^2, bool [N]; not where a coordinate is none."""
    xy_N2 = xyz_N3[:, :2]
    return ((xy_N2 >= -reach) & (xy_N2 < reach)).all(dim=1) & xyz_N3.isfinite().all(dim=1)


def field_at(field_BCHW: Tensor, xy_N2: Tensor, cloud_N: Tensor, reach: float) -> Tensor:
    """Fields at places of their clouds, [N C], linear between the middles of cells, with zeros around the fields.

    Sums are made in float32 or wider. A place that is none has zeros.
    """
    _, C, H, W = field_BCHW.shape
    rows_VC = field_BCHW.movedim(1, -1).reshape(-1, C)
    sides_2 = torch.tensor([W, H], device=xy_N2.device)
    place_N2 = (wide(xy_N2) / reach + 1) * (sides_2 / 2) - 0.5
    # Beyond the zeros that surround a field all is zero.
    place_N2 = place_N2.nan_to_num(-2, -2, -2).clamp_min(-2).minimum(sides_2 + 1.0)
    low_N2 = place_N2.detach().floor()
    share_N2 = place_N2 - low_N2
    found_NC = wide(field_BCHW).new_zeros(len(xy_N2), C)
    for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
        step_2 = torch.tensor([right, down], device=xy_N2.device)
        at_N2 = low_N2.long() + step_2
        there_N = ((at_N2 >= 0) & (at_N2 < sides_2)).all(dim=1)
        x_N, y_N = at_N2.clamp_min(0).minimum(sides_2 - 1).unbind(1)
        weight_N = torch.where(step_2 == 1, share_N2, 1 - share_N2).prod(dim=1) * there_N
        found_NC = found_NC + weight_N[:, None] * rows_VC[(cloud_N * H + y_N) * W + x_N]
    return found_NC


def warped(field_BCHW: Tensor, moves: GroundMoves, reach: float) -> Tensor:
    """W_T of fields, [B C H W]: of cells that come from outside zeros."""
    B, _, H, W = field_BCHW.shape
    device, dtype = field_BCHW.device, widest_float(field_BCHW.device)
    y_H, x_W = ((2 * torch.arange(side, device=device, dtype=dtype) + 1) * (reach / side) - reach for side in (H, W))
    grid_V2 = torch.stack([x_W.expand(H, W), y_H[:, None].expand(H, W)], dim=-1).reshape(-1, 2)
    cloud_N = torch.arange(B, device=device).repeat_interleave(H * W)
    moves = GroundMoves(*(part.to(dtype) for part in moves))
    from_N2 = moves.inverse().ground(grid_V2.repeat(B, 1), cloud_N)
    found_NC = field_at(field_BCHW, from_N2, cloud_N, reach)
    return found_NC.unflatten(0, (B, H, W)).movedim(-1, 1).to(field_BCHW.dtype)
