"""Clouds as maps: pixels against a plain loop, what they do not depend on, and clouds without extent."""

import math

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.autograd import gradcheck

from lightspan.core.errors import UserError
from lightspan.nn.points.projection import AXIS_ORDERS, MapProjection, projected, seen_along

OFFSETS = torch.tensor([0, 5, 5, 6, 40])


def clouds(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    drawn = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn * torch.tensor([1.0, 0.4, 2.0])).to(dtype)


def looped(view: Tensor, features: Tensor, offsets: Tensor, side: int, spread: int) -> tuple[Tensor, list[int]]:
    """The paper's sentences, one after another: the maps and each point's own pixel."""
    maps = torch.zeros(len(offsets) - 1, features.shape[1], side, side, dtype=features.dtype)
    pixels = []
    for cloud, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        points = view[first:end].tolist()
        if not points:
            continue
        low = [min(point[axis] for point in points) for axis in (0, 1)]
        ranges = [max(point[axis] for point in points) - low[axis] for axis in (0, 1)]
        cell = max(ranges) / (side - spread) or 1.0
        cells = [[math.floor((point[axis] - low[axis]) / cell + 1e-9) for axis in (0, 1)] for point in points]
        before = [(side - (max(one[axis] for one in cells) + spread)) // 2 for axis in (0, 1)]
        for point, (right, down) in enumerate(cells, start=first):
            left, top = right + before[0], down + before[1]
            pixels.append((cloud * side + top + spread // 2) * side + left + spread // 2)
            for row in range(top, top + spread):
                for column in range(left, left + spread):
                    assert 0 <= row < side
                    assert 0 <= column < side
                    maps[cloud, :, row, column] += features[point]
    return maps, pixels


@pytest.mark.parametrize(("side", "spread"), [(16, 3), (17, 3), (16, 5), (7, 1), (4, 3)])
def test_maps_are_those_of_a_loop(side: int, spread: int) -> None:
    view, features = clouds(), clouds(seed=1)
    found = projected(view, OFFSETS, side, spread)
    maps, pixels = looped(view, features, OFFSETS, side, spread)
    assert found.pixel_N.tolist() == pixels
    torch.testing.assert_close(found.scattered(features), maps)
    assert not found.scattered(features)[1].any()  # of the cloud without points


def test_features_come_back_from_where_their_points_lie() -> None:
    found = projected(clouds(), OFFSETS, 12)
    numbers_BCSS = torch.arange(4 * 2 * 144).view(4, 2, 12, 12)
    first, second = found.gathered(numbers_BCSS).unbind(1)
    owner, inside = found.pixel_N // 144, found.pixel_N % 144
    assert torch.equal(first, owner * 288 + inside)
    assert torch.equal(second, owner * 288 + 144 + inside)
    alone = projected(clouds()[:1], torch.tensor([0, 1]), 12)  # with one point nothing is added
    assert torch.equal(alone.gathered(alone.scattered(clouds()[:1])), clouds()[:1])


def test_gradients_reach_features_and_never_positions() -> None:
    xyz, features = clouds().requires_grad_(), clouds(seed=1).requires_grad_()
    found = projected(seen_along(xyz, OFFSETS, torch.eye(3).expand(4, 3, 3)), OFFSETS, 8, 5)
    assert gradcheck(found.scattered, features)
    assert gradcheck(lambda x: found.gathered(found.scattered(x).square()), features)
    found.scattered(features).square().sum().backward()
    assert xyz.grad is None


def test_place_scale_and_order_of_points_make_no_difference() -> None:
    xyz, features = clouds(), clouds(seed=1)
    maps = projected(xyz, OFFSETS, 16).scattered(features)
    moved = xyz * 4 + torch.tensor([8.0, -3.0, 5.0])  # exact up to rounding far below a cell
    torch.testing.assert_close(projected(moved, OFFSETS, 16).scattered(features), maps)
    order = torch.cat([torch.arange(6), 6 + torch.randperm(34, generator=torch.Generator().manual_seed(2))])
    torch.testing.assert_close(projected(xyz[order], OFFSETS, 16).scattered(features[order]), maps)
    alone = projected(xyz[6:], torch.tensor([0, 34]), 16).scattered(features[6:])
    torch.testing.assert_close(alone, maps[3:])


def test_the_longer_side_fills_the_map_and_the_other_lies_in_its_middle() -> None:
    corners = torch.tensor([[0.0, 0, 0], [10, 4, 0]])
    found = projected(corners, torch.tensor([0, 2]), 13).scattered(torch.ones(2, 1))[0, 0]
    rows, columns = found.nonzero().unbind(1)
    assert sorted({*columns.tolist()}) == [0, 1, 2, 10, 11, 12]
    assert sorted({*rows.tolist()}) == [3, 4, 5, 7, 8, 9]
    assert found[3:6, :3].all()  # to the right and down
    assert found[7:10, 10:].all()


def test_clouds_without_extent_keep_inside_of_their_map() -> None:
    equal, line = torch.full((3, 3), 7.0), torch.tensor([[2.0, 0, 0], [2, 1, 0], [2, 3, 0]])
    tiny = torch.tensor([[0.0, 0, 0], [1e-45, 0, 0], [0, 1e-44, 0]])
    large = torch.tensor([[-3e38, 0, 0], [3e38, 1, 0], [0, 2, 0]])
    unknown = torch.tensor([[torch.nan, 0, 0], [torch.inf, 1, 0], [0, -torch.inf, 0]])
    for cloud in (equal, line, line[:, [1, 0, 2]], tiny, large, unknown, equal[:1]):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            found = projected(cloud.to(dtype), torch.tensor([0, len(cloud)]), 9)
            rows, columns = (found.pixel_N // 9).tolist(), (found.pixel_N % 9).tolist()
            assert min(rows + columns) >= 1
            assert max(rows + columns) <= 7
    assert projected(equal, torch.tensor([0, 3]), 9).pixel_N.tolist() == [40, 40, 40]
    assert (projected(line, torch.tensor([0, 3]), 9).pixel_N % 9).tolist() == [4, 4, 4]
    nothing = projected(equal[:0], torch.zeros(1, dtype=torch.int64), 9)
    assert nothing.scattered(equal[:0]).shape == (0, 3, 9, 9)
    assert nothing.gathered(torch.zeros(0, 2, 9, 9)).shape == (0, 2)


def test_sums_of_half_precision_are_wide_and_leave_in_its_type() -> None:
    found = MapProjection(torch.zeros(1001, dtype=torch.int64), 1, 1, 1)
    assert found.scattered(torch.ones(1001, 1, dtype=torch.bfloat16)).item() == 1000  # adding one by one ends at 256
    assert found.scattered(torch.ones(1001, 1, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_views_are_rotations_of_each_cloud() -> None:
    turns = torch.tensor(Rotation.random(4, random_state=0).as_matrix())
    found = seen_along(clouds(), OFFSETS, turns)
    for turn, one, seen in zip(turns, *(x.split(OFFSETS.diff().tolist()) for x in (clouds(), found)), strict=True):
        torch.testing.assert_close(seen, one @ turn.T)
    for order in AXIS_ORDERS:
        turn = torch.eye(3)[list(order)]
        assert torch.linalg.det(turn) == 1
        assert torch.equal(seen_along(clouds(), OFFSETS, turn.expand(4, 3, 3)), clouds()[:, order])


def test_sizes_that_do_not_fit_are_refused() -> None:
    for side, spread in ((9, 2), (9, 0), (3, 3), (0, 1)):
        with pytest.raises(UserError, match="spread"):
            projected(clouds(), OFFSETS, side, spread)
