"""Voxels of clouds: each place once, in order, whichever cloud and whichever sign; and what lies beside or in them."""

from itertools import product

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.nn.voxels.grid import CLOUDS, REACH, coarser, nearest_to_mean, neighbours, voxelised, voxels_at


def places(rows: int = 60, clouds: int = 3, width: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(clouds + 1) * (rows // clouds)
    return torch.randint(-width, width, (rows, 3), generator=generator), offsets


def as_tuples(voxels) -> list[tuple[int, ...]]:
    return [(cloud, *place) for cloud, place in zip(voxels.cloud_V.tolist(), voxels.place_V3.tolist(), strict=True)]


def test_each_place_of_each_cloud_is_one_voxel_in_order() -> None:
    place, offsets = places()
    voxels, voxel = voxels_at(place, offsets)
    rows = [(row // 20, *at) for row, at in enumerate(place.tolist())]
    assert as_tuples(voxels) == sorted({*rows})
    assert [as_tuples(voxels)[at] for at in voxel.tolist()] == rows
    counts = [sum(cloud == owner for cloud, *_ in as_tuples(voxels)) for owner in range(3)]
    assert voxels.offsets.diff().tolist() == counts


def test_the_farthest_places_and_the_last_cloud_have_voxels() -> None:
    corners = torch.tensor([*product((-REACH, REACH), repeat=3)])
    offsets = torch.zeros(CLOUDS + 1, dtype=torch.int64)
    offsets[-1] = 8
    voxels, _ = voxels_at(corners, offsets)
    assert as_tuples(voxels) == [(CLOUDS - 1, *corner) for corner in corners.tolist()]
    assert voxels.offsets.tolist() == [0] * CLOUDS + [len(corners)]
    assert (neighbours(voxels, torch.tensor([[0, 0, 15], [-15, 0, 0]])) == -1).all()


def test_places_beyond_the_grid_and_nowhere_are_refused() -> None:
    offsets = torch.tensor([0, 1])
    for x in (REACH + 1.0, -REACH - 1.0, 1e30, float("nan"), float("inf")):
        with pytest.raises(UserError, match="raise the side"):
            voxelised(torch.tensor([[0.0, x, 0.0]]), offsets, 1.0)
    with pytest.raises(UserError, match="batch_size"):
        voxels_at(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(CLOUDS + 2, dtype=torch.int64))


def test_points_lie_in_the_voxel_that_holds_them() -> None:
    xyz = torch.tensor([[0.0, 0.0, 0.0], [0.49, -0.01, 0.5], [0.2, 0.1, 0.3]])
    voxels, voxel = voxelised(xyz, torch.tensor([0, 3, 3]), 0.5)
    assert as_tuples(voxels) == [(0, 0, -1, 1), (0, 0, 0, 0)]
    assert voxel.tolist() == [1, 0, 1]
    assert voxels.offsets.tolist() == [0, 2, 2]


def test_neighbours_are_those_of_a_dictionary_and_never_of_another_cloud() -> None:
    voxels, _ = voxels_at(*places())
    steps = torch.tensor([*product((-1, 0, 1), repeat=3)])
    known = {at: row for row, at in enumerate(as_tuples(voxels))}
    for step, found in zip(steps.tolist(), neighbours(voxels, steps).tolist(), strict=True):
        for (cloud, *place), row in zip(as_tuples(voxels), found, strict=True):
            assert row == known.get((cloud, *(a + b for a, b in zip(place, step, strict=True))), -1)


def test_coarser_voxels_hold_their_children_below_zero_too() -> None:
    voxels, _ = voxels_at(*places())
    for stride in (2, 3):
        coarse, parent = coarser(voxels, stride)
        for (cloud, *place), row in zip(as_tuples(voxels), parent.tolist(), strict=True):
            assert as_tuples(coarse)[row] == (cloud, *(at // stride for at in place))
        assert set(parent.tolist()) == set(range(len(coarse.key_V)))


def test_a_group_is_stood_for_by_the_row_nearest_to_its_mean() -> None:
    xyz = torch.tensor([[0.0, 0, 0], [5, 5, 5], [1, 0, 0], [7, 7, 7], [5, 0, 0], [6, 6, 6]])
    group = torch.tensor([0, 1, 0, 1, 0, 1])
    assert nearest_to_mean(xyz, group, 2).tolist() == [2, 5]  # means 2 and 6
    pair = torch.tensor([[0.7, 0.1, 0.3], [0.1, 0.9, 0.5]])
    assert nearest_to_mean(pair, torch.tensor([0, 0]), 1).tolist() == [1]  # whatever rounding says
    assert nearest_to_mean(pair.flip(0), torch.tensor([0, 0]), 1).tolist() == [0]
    equal = torch.zeros(4, 3)
    assert nearest_to_mean(equal, torch.tensor([1, 0, 0, 1]), 2).tolist() == [1, 0]
    assert nearest_to_mean(xyz.bfloat16(), group, 2).tolist() == [2, 5]


def test_clouds_without_points_have_no_voxels() -> None:
    voxels, voxel = voxelised(torch.zeros(0, 3), torch.zeros(3, dtype=torch.int64), 0.1)
    assert voxels.offsets.tolist() == [0, 0, 0]
    assert len(voxel) == len(voxels.key_V) == 0
    coarse, parent = coarser(voxels, 2)
    assert len(coarse.key_V) == len(parent) == len(nearest_to_mean(torch.zeros(0, 3), voxel, 0)) == 0
    assert neighbours(voxels, torch.tensor([[0, 0, 1]])).shape == (1, 0)
