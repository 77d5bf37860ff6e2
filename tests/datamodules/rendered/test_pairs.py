"""Pairs of views: cameras, depths, correspondences and co-visibility agree with one another and with the pixels."""

from typing import Any

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.rendered.pairs import PairSpace, ScenePairs, cast, intrinsics, turns
from lightspan.datamodules.rendered.scenes import Style

CLEAN = PairSpace(48, 48, 2, 5, 1.0, Style(grain=0.0))


def test_a_turn_as_a_vector_gives_its_rotation_back() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 3))
    vectors = np.concatenate([vectors, 1e-4 * vectors, np.zeros((1, 3)), [[0, 0, 3.1]]])
    x, y, z = vectors.T
    zero = np.zeros_like(x)
    cross = np.array([[zero, -z, y], [z, zero, -x], [-y, x, zero]]).transpose(2, 0, 1)
    rotation = torch.linalg.matrix_exp(torch.from_numpy(cross)).numpy()
    np.testing.assert_allclose(turns(rotation), vectors, atol=1e-9)
    found = turns(rotation.astype(np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, vectors, atol=1e-5)


@pytest.fixture(scope="module")
def drawn() -> Any:
    return CLEAN.pairs(0, np.arange(24))


def test_depth_carried_over_by_the_cameras_lands_on_the_corresponding_pixel() -> None:
    data = ScenePairs(size=16, batch_size=4)
    data.setup()
    batch = data.train.batch(range(16), [0] * 16)
    lens, R, t = (batch[name].double() for name in ("intrinsics", "rotation", "translation"))
    assert torch.allclose(R @ R.mT, torch.eye(3).double().expand(16, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(R), torch.ones(16).double(), atol=1e-6)
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).flatten(1).double()
    for view, (rotation, shift) in enumerate([(R, t), (R.mT, -(R.mT @ t[..., None])[..., 0])]):
        points = torch.linalg.inv(lens) @ pixels * batch["depth"][:, view].flatten(1)[:, None]
        there = lens @ (rotation @ points + shift[..., None])
        found = (there[:, :2] / there[:, 2:]).mT.unflatten(1, (48, 48))
        assert (found - batch["matches"][:, view]).abs().max() < 0.01  # pixels
        inside = (found > -0.5).all(dim=3) & (found < 47.5).all(dim=3)
        assert not (batch["covisible"][:, view].bool() & ~inside).any()


def test_points_lie_on_surfaces_and_nothing_stands_before_them(drawn: Any) -> None:
    boxes, cameras, pairs = drawn
    lens = np.linalg.inv(intrinsics(48, 48).astype(float))
    rng = np.random.default_rng(0)
    for row, view, y, x in zip(*(rng.integers(n, size=300) for n in (24, 2, 48, 48)), strict=True):
        place, rotation = (field[row].astype(float) for field in cameras[view])
        ray = rotation.T @ lens @ [x, y, 1]
        ends = []
        for k in range(6):
            turn = np.array(
                [[boxes.cos[row, k], 0, -boxes.sin[row, k]], [0, 1, 0], [boxes.sin[row, k], 0, boxes.cos[row, k]]]
            )
            start, way, half = turn @ (place - boxes.centre[row, k]), turn @ ray, boxes.half[row, k]
            for axis in range(3):  # each face by itself, in place of slabs
                for side in (-1, 1):
                    length = (side * half[axis] - start[axis]) / way[axis]
                    point = start + length * way
                    others = [i for i in range(3) if i != axis]
                    if length > 1e-6 and half[axis] > 0 and (np.abs(point[others]) <= half[others]).all():
                        ends.append(length)
        assert pairs.depth[row, view, y, x] == pytest.approx(min(ends), rel=1e-3)


def test_what_both_views_show_has_one_colour_and_leads_back(drawn: Any) -> None:
    _, _, pairs = drawn
    both = pairs.covisible[:, 0]
    assert 0.5 < both.mean() < 0.95
    row, y, x = np.nonzero(both)
    there = pairs.matches[row, 0, y, x]
    u, v = np.rint(there).astype(int).clip(0, 47).T
    off = np.abs(there - np.stack([u, v], axis=1)).max(axis=1)
    close = off < 0.15  # where the other view has a pixel's middle close by
    assert close.sum() > 1000
    here, other = pairs.images[row, 0, :, y, x].astype(float), pairs.images[row, 1, :, v, u].astype(float)
    differs = np.abs(here - other).mean(axis=1)[close]
    assert np.median(differs) < 6
    assert np.median(differs) < 0.2 * np.median(np.abs(here - np.roll(other, 500, axis=0)))
    back = pairs.matches[row, 1, v, u]
    assert np.median(np.abs(back - np.stack([x, y], axis=1))[close]) < 0.3
    assert pairs.covisible[row, 1, v, u][close].mean() > 0.95


def test_cameras_that_do_not_move_see_the_same() -> None:
    _, _, pairs = CLEAN._replace(motion=0.0).pairs(0, np.arange(3))
    assert pairs.covisible.mean() > 0.999
    assert np.array_equal(pairs.images[:, 0], pairs.images[:, 1])
    y, x = np.mgrid[:48, :48]
    assert np.abs(pairs.matches - np.stack([x, y], axis=2)).max() < 1e-2


def test_a_pair_has_the_same_bits_in_any_batch() -> None:
    numbers = np.array([7, 2**33, 0, *range(20, 36)])
    space = CLEAN._replace(style=Style(), height=20)
    together = space.pairs(3, numbers)[2]
    for row in (0, 1, 18):
        alone = space.pairs(3, numbers[[row]])[2]
        assert all(np.array_equal(a[row], b[0]) for a, b in zip(together, alone, strict=True))


def test_a_ray_meets_the_nearest_body() -> None:
    boxes, _, _ = CLEAN.pairs(0, np.arange(1))
    place, ray = np.zeros((1, 3), dtype=np.float32), np.float32([[[0], [0], [1]]])
    bare = boxes._replace(half=np.where(np.arange(6)[None, :, None] == 0, boxes.half, 0))
    assert cast(bare, place, ray)[0].item() == pytest.approx(4.2)  # the room's back
    centre, half = bare.centre.copy(), bare.half.copy()
    centre[0, 2], half[0, 2] = (0, 0, 2), 0.5
    centre[0, 4], half[0, 4] = (0, 0, 3), 0.5
    upright = bare._replace(centre=centre, half=half, cos=np.ones_like(bare.cos), sin=np.zeros_like(bare.sin))
    length, body = cast(upright, place, ray)
    assert (length.item(), body.item()) == (pytest.approx(1.5), 2)


@pytest.mark.parametrize("space", [PairSpace(1, 1, 0, 1, 1.0, Style()), PairSpace(2, 5, 0, 1, 2.0, Style(grain=0.0))])
def test_small_pictures_and_empty_rooms_are_ordinary(space: PairSpace) -> None:
    _, _, pairs = space.pairs(0, np.arange(20))
    assert np.isfinite(pairs.depth).all()
    assert np.isfinite(pairs.matches).all()
    assert (pairs.depth > 0).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"height": 0}, "height=0"), ({"fewest": 6}, "fewest=6 to most=5"), ({"motion": 3.0}, "motion=3.0")],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ScenePairs(**settings)
