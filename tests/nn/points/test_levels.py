"""Groups of groups, features at finer points, and depth maps: against loops, scipy and torch's interpolation."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.nn.points.depth_maps import cloud_maps, depth_maps, read_at_pixels
from lightspan.nn.points.groups import grouped, nested_groups, places_in_cloud
from lightspan.nn.points.interpolation import interpolated
from lightspan.nn.points.projection import AXIS_ORDERS, projected

COUNTS = 40, 0, 1, 9


def packed(counts: tuple[int, ...] = COUNTS, seed: int = 0) -> tuple[Tensor, Tensor]:
    xyz = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return xyz, torch.tensor([0, *np.cumsum(counts).tolist()])


def test_each_level_groups_the_centres_of_the_one_below() -> None:
    xyz, offsets = packed()
    fine, coarse = nested_groups(xyz, offsets, (8, 3), (5, 4))
    plain = grouped(xyz, offsets, 8, 5)
    for ours, theirs in zip((fine.centre_BG3, fine.near_BGK3, fine.real_B), plain, strict=True):
        assert torch.equal(ours, theirs)
    above = grouped(fine.centre_BG3[0], torch.tensor([0, 8]), 3, 4)  # of the first cloud alone
    assert torch.equal(coarse.centre_BG3[0], above.centre_BG3[0])
    assert torch.equal(coarse.near_BGK3[0], above.near_BGK3[0])
    for level, below in ((coarse, fine.centre_BG3[0]), (fine, xyz[:40])):
        assert torch.equal(below[level.centre_BG[0]], level.centre_BG3[0])
        assert torch.equal(below[level.near_BGK[0]] - level.centre_BG3[0, :, None], level.near_BGK3[0])
    assert coarse.real_B.tolist() == [True, False, True, True]
    assert not coarse.centre_BG3[1].any()


def test_places_of_points_of_any_level_lead_to_them() -> None:
    xyz, offsets = packed((40, 9))
    levels = nested_groups(xyz, offsets, (8, 6, 3), (5, 4, 2))
    for number, level in enumerate(levels):
        places = places_in_cloud(levels, number)
        for cloud, points in enumerate(xyz.split((40, 9))):
            torch.testing.assert_close(points[places[cloud]] - level.centre_BG3[cloud, :, None], level.near_BGK3[cloud])
            assert torch.equal(points[places[cloud, :, 0]], level.centre_BG3[cloud])


def test_features_at_finer_points_are_weighted_as_by_scipy() -> None:
    coarse, fine = packed((7,), 1)[0], packed((20,), 2)[0]
    fine[0] = coarse[3]  # a fine point that is a coarse one
    features = torch.randn(1, 7, 5, dtype=torch.float64)
    found = interpolated(features, coarse[None], fine[None])[0]
    apart, near = cKDTree(coarse.numpy()).query(fine.numpy(), k=3)
    weights = 1 / np.maximum(apart**2, 1e-30)
    weights /= weights.sum(axis=1, keepdims=True)
    expected = (features[0].numpy()[near] * weights[..., None]).sum(axis=1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    torch.testing.assert_close(found[0], features[0, 3], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(interpolated(features, 1e-6 * coarse[None], 1e-6 * fine[None])[0], found)


def test_features_of_few_or_equal_points_are_their_mean() -> None:
    features, fine = torch.randn(1, 3, 4), torch.randn(1, 5, 3)
    one = interpolated(features[:, :1], torch.randn(1, 1, 3), fine)
    torch.testing.assert_close(one, features[:, :1].expand_as(one))
    same = interpolated(features, torch.ones(1, 3, 3), torch.ones(1, 5, 3))
    torch.testing.assert_close(same, features.mean(1, keepdim=True).expand_as(same))
    half = interpolated(features.bfloat16(), torch.zeros(1, 3, 3).bfloat16(), fine.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


def test_gradients_of_features_at_finer_points_are_right() -> None:
    coarse, fine = packed((5,), 1)[0][None], packed((6,), 2)[0][None]
    features = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: interpolated(x, coarse, fine), features)


def test_depth_is_the_mean_of_a_pixel_from_half_far_to_one_near() -> None:
    view = torch.tensor([[0.0, 0, 2], [0, 0, 4], [1, 0, 6], [1, 1, 4]], dtype=torch.float64)
    offsets = torch.tensor([0, 4])
    at = projected(view, offsets, 4, 1)
    grey = depth_maps(view, offsets, at)[0].flatten()
    assert grey[at.pixel_N].tolist() == [0.875, 0.875, 0.5, 0.75]  # 1 and 0.75 share a pixel
    assert int((grey > 0).sum()) == 3


def test_depth_maps_do_not_depend_on_place_size_or_order_and_are_flat_of_equal_points() -> None:
    xyz, offsets = packed((40, 9))
    before = cloud_maps(xyz, offsets, 24, 5)
    for other in (xyz * 1000, xyz + 7):
        after = cloud_maps(other, offsets, 24, 5)
        assert torch.equal(after.pixel_BVM, before.pixel_BVM)
        torch.testing.assert_close(after.grey_BVSS, before.grey_BVSS)
    turned = torch.cat([xyz[:40].flip(0), xyz[40:]])
    torch.testing.assert_close(cloud_maps(turned, offsets, 24, 5).grey_BVSS, before.grey_BVSS)
    assert before.grey_BVSS.amin() == 0
    assert before.grey_BVSS.amax() <= 1
    equal = cloud_maps(torch.full((6, 3), 2.0), torch.tensor([0, 0, 6]), 24, 5).grey_BVSS
    assert not equal[0].any()
    assert equal[1].unique().tolist() == [0, 1]
    assert equal[1].sum() == 3 * 25


def test_reading_at_pixels_is_interpolation_and_then_picking() -> None:
    maps, pixels = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.arange(12 * 12).repeat(2, 1)
    large = F.interpolate(maps, (12, 12), mode="bicubic", align_corners=False)
    torch.testing.assert_close(read_at_pixels(maps, pixels, 12), large.flatten(2).transpose(1, 2))


def test_points_read_their_own_pixel_in_each_view() -> None:
    xyz, offsets = packed((40, 9))
    maps = cloud_maps(xyz, offsets, 24, 3)
    numbers = torch.arange(24 * 24, dtype=torch.float64).view(1, 1, 1, 24, 24).expand(2, 3, -1, -1, -1)
    found = maps.read(numbers, torch.arange(9).repeat(2, 1))[..., 0]
    for view, order in enumerate(AXIS_ORDERS):
        own = projected(xyz[:, order], offsets, 24, 3).pixel_N % 24**2
        torch.testing.assert_close(found[0, :, view], own[:9].double())
        torch.testing.assert_close(found[1, :, view], own[40:49].double())


def test_sizes_that_do_not_fit_are_refused() -> None:
    xyz, offsets = packed()
    with pytest.raises(UserError, match="groups=0"):
        nested_groups(xyz, offsets, (4, 0), (2, 2))
