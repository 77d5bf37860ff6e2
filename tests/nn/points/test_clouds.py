"""Packed clouds: means and maxima against loops, padding, groups against scipy, and clouds of few or equal points."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch import Tensor
from torch.autograd import gradcheck

from lightspan.core.errors import UserError
from lightspan.core.ragged import kept_offsets, padded, ragged_maxima, ragged_means, row_owners
from lightspan.nn.points import groups as groups_module
from lightspan.nn.points.clouds import points_of
from lightspan.nn.points.groups import farthest_points, grouped, nearest_points

COUNTS = 5, 0, 1, 7, 0


def packed(
    counts: tuple[int, ...] = COUNTS, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    offsets = torch.tensor([0, *np.cumsum(counts).tolist()])
    xyz = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return xyz.to(dtype), offsets


def clouds(xyz: Tensor, offsets: Tensor) -> list[Tensor]:
    return list(xyz.split(offsets.diff().tolist()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_means_and_maxima_are_those_of_each_cloud_and_zero_of_an_empty_one(dtype: torch.dtype) -> None:
    xyz, offsets = packed(dtype=dtype)
    xyz = xyz - 5  # maxima below 0, which are no default
    for found, each in (
        (ragged_means(xyz, offsets), lambda x: x.mean(0)),
        (ragged_maxima(xyz, offsets), lambda x: x.amax(0)),
    ):
        rows = [each(cloud) if len(cloud) else torch.zeros(3, dtype=dtype) for cloud in clouds(xyz, offsets)]
        torch.testing.assert_close(found, torch.stack(rows))
    assert row_owners(offsets, len(xyz)).tolist() == [0] * 5 + [2] + [3] * 7
    nothing = torch.zeros(0, 3), torch.zeros(1, dtype=torch.int64)
    assert ragged_means(*nothing).shape == ragged_maxima(*nothing).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_many_rows_do_not_leave_the_range_of_half_types(dtype: torch.dtype) -> None:
    offsets = torch.tensor([0, 70_000, 70_300])
    x = torch.cat([torch.ones(70_000, 2), torch.full((300, 2), 300.0)]).to(dtype)
    assert torch.equal(ragged_means(x, offsets), x[[0, -1]])


def test_gradients_of_means_maxima_and_groups_are_right() -> None:
    xyz, offsets = packed()
    xyz.requires_grad_()
    assert gradcheck(lambda x: ragged_means(x, offsets), xyz)
    assert gradcheck(lambda x: ragged_maxima(x, offsets), xyz)
    assert gradcheck(lambda x: grouped(x, offsets, 2, 3)[:2], xyz)


def test_offsets_of_kept_rows_cut_them_into_the_same_clouds() -> None:
    xyz, offsets = packed()
    kept = xyz[:, 0] > 0
    cut = clouds(xyz[kept], kept_offsets(kept, offsets))
    for found, cloud in zip(cut, clouds(xyz, offsets), strict=True):
        assert torch.equal(found, cloud[cloud[:, 0] > 0])


def test_padding_keeps_rows_and_tells_them_apart() -> None:
    xyz, offsets = packed()
    xyz_BM3, real_BM = padded(xyz, offsets)
    assert xyz_BM3.shape == (5, 7, 3)
    assert real_BM.sum(1).tolist() == list(COUNTS)
    assert torch.equal(xyz_BM3[real_BM], xyz)
    assert not xyz_BM3[~real_BM].any()
    assert padded(xyz[:0], offsets[:1])[0].shape == (0, 1, 3)


def test_farthest_points_are_those_of_a_loop() -> None:
    xyz, offsets = packed((40, 9))
    found = farthest_points(*padded(xyz, offsets), 6)
    for cloud, places in zip(clouds(xyz, offsets), found.tolist(), strict=True):
        points = cloud.numpy()
        expected = [int(np.argmax(np.linalg.norm(points - points.mean(0), axis=1)))]
        while len(expected) < 6:
            apart = np.linalg.norm(points[:, None] - points[expected][None], axis=2).min(axis=1)
            expected.append(int(apart.argmax()))
        assert places == expected


def test_nearest_points_are_those_of_scipy_whatever_is_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    xyz, offsets = packed((40, 9))
    xyz = xyz.float() + 1000  # where products of coordinates lose what is near
    xyz_BM3, real_BM = padded(xyz, offsets)
    centre_BG3 = xyz_BM3[:, :5]
    whole = nearest_points(centre_BG3, xyz_BM3, real_BM, 8)
    monkeypatch.setattr(groups_module, "MOST_DISTANCES", 1)
    assert torch.equal(nearest_points(centre_BG3, xyz_BM3, real_BM, 8), whole)
    for cloud, centres, places in zip(clouds(xyz, offsets), centre_BG3, whole, strict=True):
        apart, _ = cKDTree(cloud.numpy()).query(centres.numpy(), k=8)
        ours = (cloud[places] - centres[:, None]).norm(dim=2)
        np.testing.assert_allclose(ours.numpy(), apart, atol=1e-6)


def test_few_and_equal_points_are_repeated_and_an_empty_cloud_is_marked() -> None:
    few = torch.tensor([[0.0, 0, 0], [1, 0, 0], [5, 0, 0]])
    xyz, offsets = torch.cat([few, torch.full((4, 3), 2.0)]), torch.tensor([0, 3, 7, 7])
    found = grouped(xyz, offsets, 5, 4)
    assert found.real_B.tolist() == [True, True, False]
    assert found.centre_BG3[0, :, 0].tolist() == [5, 0, 1, 5, 0]
    assert (found.near_BGK3[0, :, :, 0] + found.centre_BG3[0, :, None, 0])[1].tolist() == [0, 1, 5, 0]
    assert (found.centre_BG3[1] == 2).all()
    assert not found.near_BGK3[1:].any()
    assert not found.centre_BG3[2].any()


@pytest.mark.parametrize("far", [1e30, torch.inf, torch.nan])
def test_points_without_a_distance_stay_in_their_cloud(far: float) -> None:
    xyz, offsets = packed((3, 9), torch.float32)
    xyz[:2] = torch.tensor([[far, 0, 0], [0, 1, -far]])
    xyz_BM3, real_BM = padded(xyz, offsets)
    near_BGK = nearest_points(xyz_BM3, xyz_BM3, real_BM, 4)
    assert near_BGK[0].max() <= 2
    assert near_BGK.min() >= 0
    assert farthest_points(xyz_BM3, real_BM, 6)[0].max() <= 2


def test_groups_do_not_depend_on_the_order_of_points_or_on_other_clouds() -> None:
    xyz, offsets = packed((30, 50), torch.float32)
    both, alone = grouped(xyz, offsets, 6, 4), grouped(xyz[:30], offsets[:2], 6, 4)
    turned = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    mixed = grouped(xyz[:30][turned], offsets[:2], 6, 4)
    for one in (alone, mixed):
        assert torch.equal(one.centre_BG3[0], both.centre_BG3[0])
        assert torch.equal(one.near_BGK3[0], both.near_BGK3[0])


def test_batches_of_other_fields_are_refused() -> None:
    xyz, offsets = packed()
    good = {"xyz": xyz, "offsets": offsets, "index": torch.arange(5)}
    assert points_of(good, "Tests")[0] is xyz
    for wrong in ({"xyz": xyz.long()}, {"xyz": xyz[:, :2]}, {"xyz": xyz[1:]}, {"offsets": offsets.float()},
                  {"offsets": offsets[1:]}, {"index": torch.arange(4)}, {"xyz": None}):  # fmt: skip
        with pytest.raises(UserError, match="Tests"):
            points_of(good | wrong, "Tests")
    with pytest.raises(UserError, match="groups=0"):
        grouped(xyz, offsets, 0, 3)
