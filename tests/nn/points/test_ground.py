"""Fields over the ground: moves make a group, sampling follows points, and what lies outside is zero."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.nn.points.ground import GroundGroup, GroundMoves, field_at, inside, turned_by, warped


def moves(matrix: Any = ((1, 0), (0, 1)), shift: tuple[float, float] = (0, 0), lift: float = 1, rows: int = 2) -> Any:
    given = torch.tensor(matrix), torch.tensor(shift), torch.tensor(lift)
    return GroundMoves(*(x.double().expand(rows, *x.shape) for x in given))


QUARTER, MIRROR = ((0, -1), (1, 0)), ((1, 0), (0, -1))
WHOLE = [moves(QUARTER), moves(MIRROR), moves(shift=(2, -1)), moves(QUARTER, (1, 3)), moves(((-1, 0), (0, 1)), (-2, 0))]
"""On cells of a side of 1."""


def blob(side: int = 12) -> Tensor:
    """Random numbers in the middle, float64 [2 3 side side], and zeros where whole moves would lose them."""
    field = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return F.pad(field, [side // 2 - 1] * 4)


def test_warps_compose_as_the_moves_do() -> None:
    field = blob()
    for first in WHOLE:
        torch.testing.assert_close(warped(warped(field, first, 6.0), first.inverse(), 6.0), field)
        for second in WHOLE:
            both = warped(warped(field, first, 6.0), second, 6.0)
            torch.testing.assert_close(both, warped(field, second.after(first), 6.0))
            assert float(both.abs().sum()) == pytest.approx(float(field.abs().sum()))


def test_whole_moves_are_those_of_arrays() -> None:
    field = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(warped(field, moves(QUARTER), 2.5), field.rot90(-1, (2, 3)))  # rows go up
    torch.testing.assert_close(warped(field, moves(MIRROR), 2.5), field.flip(2))
    torch.testing.assert_close(warped(field, moves(shift=(1, 2)), 2.5), F.pad(field, (1, -1, 2, -2)))


def test_a_moved_field_has_at_moved_points_what_it_had() -> None:
    generator = torch.Generator().manual_seed(1)
    points, cloud = 3 * torch.rand(20, 3, generator=generator, dtype=torch.float64) - 1.5, torch.arange(20) % 2
    field = blob()
    for move in WHOLE:
        found = field_at(warped(field, move, 6.0), move.points(points, cloud)[:, :2], cloud, 6.0)
        torch.testing.assert_close(found, field_at(field, points[:, :2], cloud, 6.0))


def test_places_are_read_as_grid_sample_reads_them() -> None:
    generator = torch.Generator().manual_seed(2)
    field = torch.randn(1, 3, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    xy = (5 * torch.rand(40, 2, generator=generator, dtype=torch.float64) - 2.5).requires_grad_()
    found = field_at(field, xy, torch.zeros(40, dtype=torch.int64), 2.0)
    wanted = F.grid_sample(field, xy[None, None] / 2, align_corners=False)[0, :, 0].T
    torch.testing.assert_close(found, wanted)
    for one, other in zip(*(torch.autograd.grad(x.square().sum(), (field, xy)) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other)


def test_places_that_are_none_have_zeros_and_lie_nowhere() -> None:
    nan, inf = float("nan"), float("inf")
    xyz = torch.tensor([[0, 0, 0], [nan, 0, 0], [0, inf, 0], [0, -1e30, 0], [0, 0, nan], [2, 0, 0], [-2, 0, 0]])
    assert inside(xyz, 2.0).tolist() == [True, False, False, False, False, False, True]
    found = field_at(torch.ones(1, 1, 4, 4), xyz[:, :2], torch.zeros(7, dtype=torch.int64), 2.0)[:, 0]
    assert found.tolist() == [1, 0, 0, 0, 1, 0.5, 0.5]
    assert field_at(torch.ones(1, 1, 4, 4).bfloat16(), xyz[:1, :2], torch.zeros(1).long(), 2.0).dtype == torch.float32
    assert field_at(torch.ones(0, 3, 4, 4), torch.zeros(0, 2), torch.zeros(0).long(), 2.0).shape == (0, 3)


def test_turns_are_those_of_an_angle_and_quarters_exact() -> None:
    share = torch.tensor([0, 0.25, 0.5, 0.75, 0.1, 0.9, -0.3], dtype=torch.float64)
    angle = 2 * torch.pi * share
    wanted = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).unflatten(1, (2, 2))
    torch.testing.assert_close(turned_by(share).matrix_B22, wanted)
    assert turned_by(share[1:2].float()).matrix_B22.tolist() == [[[0, -1], [1, 0]]]


def test_moves_are_drawn_within_their_settings_by_seed_alone() -> None:
    group, seed = GroundGroup(3.0, (0.5, 2.0), 0.25), torch.arange(4000)
    drawn = group.drawn(seed)
    size, across = drawn.matrix_B22[:, 0, 0], drawn.matrix_B22[:, 1, 1]
    torch.testing.assert_close(across.abs(), size)
    torch.testing.assert_close(drawn.lift_B, size)
    assert float((across < 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert 0.5 <= size.min() < 0.51 < 1.99 < size.max() <= 2
    assert (drawn.shift_B2.abs() <= 3).all()
    assert float(drawn.shift_B2.mean()) == pytest.approx(0, abs=0.1)
    for one, other in zip(group.drawn(seed[7:9]), drawn, strict=True):
        assert torch.equal(one, other[7:9])
    still = GroundGroup(0.0, (1.0, 1.0), 0.0).drawn(seed[:3])
    xyz = torch.randn(3, 3)
    assert torch.equal(still.points(xyz, torch.arange(3)), xyz)
    double = GroundGroup(0.0, (2.0, 2.0), 0.0).drawn(seed[:3])
    torch.testing.assert_close(double.points(xyz, torch.arange(3)), 2 * xyz)


@pytest.mark.parametrize(("name", "value"), [("shift", -1.0), ("scale", (0.0, 1.0)), ("flip", 1.5)])
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        GroundGroup(**{name: value})
