"""Furnished rooms: pictures, depths and classes agree with rays cut with all triangles; pieces stand apart."""

import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.datamodules.points.shapes import Shape
from lightspan.datamodules.rendered import furnished as module
from lightspan.datamodules.rendered.cameras import PosedFrames, pixel_rays
from lightspan.datamodules.rendered.furnished import (
    GAP,
    SURFACES,
    TALLEST,
    USES,
    RoomPlan,
    Sensor,
    Surfaces,
    cameras_of,
    frames_of,
    furnished,
    layout_of,
)

NAMES = sorted({name for pieces in USES.values() for name, _ in pieces})
KIND = np.repeat(np.arange(len(NAMES)), 3)
SIZE = np.random.default_rng(0).uniform(0.3, 1.4, (len(KIND), 3))


def shape_of(piece: int) -> Shape:
    """Triangles within the sides of a piece, of any direction."""
    generator = np.random.default_rng(piece)
    xyz = generator.uniform([-0.5, -0.5, 0], [0.5, 0.5, 1], (30, 3, 3)) * SIZE[piece]
    return Shape(xyz.astype(np.float32), generator.integers(0, 256, (30, 3, 3), dtype=np.uint8))


def room(number: int) -> tuple[RoomPlan, Surfaces]:
    layout = layout_of(0, number, NAMES, KIND, SIZE)
    return layout, furnished(layout, [shape_of(piece) for piece in layout.piece], KIND[layout.piece])


def drawn(number: int, views: int = 2, height: int = 9, width: int = 12) -> tuple[RoomPlan, Surfaces, PosedFrames]:
    layout, surfaces = room(number)
    return layout, surfaces, frames_of(layout, surfaces, *cameras_of(layout, 0, number, views), height, width)


def first_met(plan: RoomPlan, surfaces: Surfaces, place: np.ndarray, ray: np.ndarray) -> tuple[float, int, np.ndarray]:
    """(length, class, normal), by solving for each triangle where its plane is met."""
    best, kind, across = np.inf, -1, np.zeros(3)
    for axis in range(3):
        for sign, wall in ((1, plan.size[axis]), (-1, 0.0)):
            length = (wall - place[axis]) / ray[axis]
            if 0 < length < best and ray[axis] * sign > 0:
                best, kind, across = length, 2 if axis < 2 else int(sign > 0), np.eye(3)[axis]
    for corners, own in zip(surfaces.corners, surfaces.classes, strict=True):
        edges = np.stack([corners[1] - corners[0], corners[2] - corners[0], -ray], axis=1)
        one, two, length = np.linalg.solve(edges, place - corners[0])
        if min(one, two, 1 - one - two) >= 0 and 0 < length < best:
            best, kind, across = length, int(own), np.cross(edges[:, 0], edges[:, 1])
    across = across / np.linalg.norm(across)
    return best, kind, across if across @ ray < 0 else -across


def test_a_pixel_shows_what_its_ray_meets_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAIRS", 50)  # a few triangles at once
    kinds = set[int]()
    for number in range(3):
        layout, surfaces, frames = drawn(number)
        own = pixel_rays(frames.intrinsics, 9, 12)
        for view in range(2):
            rays = own @ frames.rotation[view].astype(float)
            for pixel in range(0, 108, 3):
                length, kind, across = first_met(layout, surfaces, frames.place[view].astype(float), rays[pixel])
                at = (view, *divmod(pixel, 12))
                assert frames.depth[at] == pytest.approx(length, abs=1e-5)
                assert frames.classes[at] == kind
                np.testing.assert_allclose(frames.normal[at[0], :, at[1], at[2]], across, atol=1e-5)
                kinds.add(kind)
    assert len(kinds) > 4


def test_triangles_behind_a_camera_and_around_it_are_met_where_they_are() -> None:
    layout = layout_of(0, 0, NAMES, np.zeros(0, np.int64), np.zeros((0, 3)))
    # A sheet that reaches from behind the camera to ahead, below it, and one wholly behind.
    sheet = np.array([[[-9.0, -9, 0.5], [9, -9, 0.5], [0, 9, 0.5]], [[1, -1, 1], [2, -1, 1], [1, -1, 2]]])
    surfaces = Surfaces(sheet, np.ones((2, 3, 3)), np.array([5, 6]))
    place = np.array([[1.5, 0.2, 1.5]], np.float32)
    rotation = np.array([[[1, 0, 0], [0, 0, -1], [0, 1, 0]]], np.float32)
    frames = frames_of(layout, surfaces, place, rotation, 8, 8)
    rays = (pixel_rays(frames.intrinsics, 8, 8) @ rotation[0].astype(float)).reshape(8, 8, 3)
    down = rays[..., 2] < 0
    meets = 1 / -np.where(down, rays[..., 2], -1)  # 1 metre above the sheet
    sheet_first = down & (meets * rays[..., 1] + 0.2 < layout.size[1]) & (frames.classes[0] != 2)
    assert sheet_first.any()
    np.testing.assert_allclose(frames.depth[0][sheet_first], meets[sheet_first], rtol=1e-5)
    assert {2, 5} <= set(np.unique(frames.classes)) <= {1, 2, 5}


def test_all_views_of_a_point_have_its_colour() -> None:
    """What one camera sees another one sees alike, where nothing is in between."""
    layout, surfaces = room(1)
    place, rotation = cameras_of(layout, 0, 1, 1)
    near = frames_of(layout, surfaces, place, rotation, 9, 9)
    centre = near.place[0] + near.depth[0, 4, 4] * rotation[0, 2]
    closer = place + np.float32(0.3) * (centre - place)
    again = frames_of(layout, surfaces, closer.astype(np.float32), rotation, 9, 9)
    np.testing.assert_allclose(again.pictures[0, :, 4, 4], near.pictures[0, :, 4, 4], atol=1e-3)
    assert again.depth[0, 4, 4] == pytest.approx(0.7 * near.depth[0, 4, 4], rel=1e-4)


def test_pieces_stand_apart_inside_of_the_room_and_cameras_outside_of_them() -> None:
    kinds, several = set[str](), 0
    for number in range(40):
        layout, surfaces = room(number)
        low, high = layout.place - layout.half[:, :2], layout.place + layout.half[:, :2]
        assert (low >= GAP - 1e-9).all()
        assert (high <= layout.size[:2] - GAP + 1e-9).all()
        for one in range(len(layout.piece)):
            for other in range(one):
                apart = np.maximum(low[one] - high[other], low[other] - high[one])
                assert apart.max() >= GAP - 1e-9
        several += len(layout.piece) > 2
        kinds |= {NAMES[kind] for kind in KIND[layout.piece]}
        assert kinds >= {NAMES[kind] for kind in surfaces.classes - len(SURFACES)}
        if len(surfaces.corners):
            assert surfaces.corners.reshape(-1, 3).min() >= 0
            assert (surfaces.corners.reshape(-1, 3) <= layout.size).all()
        place, rotation = cameras_of(layout, 0, number, 4)
        inside = (np.abs(place[:, None, :2] - layout.place) < layout.half[:, :2]).all(axis=2)
        assert not (inside & (place[:, None, 2] < layout.half[:, 2])).any()
        assert (place > 0).all()
        assert (place < layout.size).all()
        product = rotation @ rotation.swapaxes(1, 2)
        np.testing.assert_allclose(product, np.broadcast_to(np.eye(3), product.shape), atol=1e-6)
        np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-6)
        assert (rotation[:, 1, 2] < 0).all()  # what is down in a picture is down in the room
    assert kinds == set(NAMES)
    assert several > 30


def test_backs_are_at_walls() -> None:
    """A piece whose one triangle is its back."""
    found = 0
    for number in range(30):
        layout = layout_of(3, number, NAMES, KIND, SIZE)
        for at, piece in enumerate(layout.piece):
            if NAMES[KIND[piece]] in module.AT_WALL:
                x, y, z = SIZE[piece] / [2, 2, 1]
                back = Shape(np.array([[[-x, y, 0], [x, y, 0], [0, y, z]]], np.float32))
                one = layout._replace(
                    **{name: getattr(layout, name)[[at]] for name in ("piece", "turn", "place", "half")}
                )
                corners = furnished(one, [back], KIND[[piece]]).corners[0]
                walls = np.concatenate([corners[:, :2], layout.size[:2] - corners[:, :2]], axis=1)
                assert np.abs(walls - GAP).max(axis=0).min() < 1e-6
                found += 1
    assert found > 20


def test_a_room_depends_on_its_number_alone_and_may_have_no_piece() -> None:
    one, two = layout_of(5, 7, NAMES, KIND, SIZE), layout_of(5, 7, NAMES, KIND, SIZE)
    for left, right in zip(one, two, strict=True):
        np.testing.assert_array_equal(left, right)
    assert any(not np.array_equal(one.size, layout_of(5, other, NAMES, KIND, SIZE).size) for other in (6, 8))
    bare = layout_of(5, 7, NAMES, np.zeros(0, np.int64), np.zeros((0, 3)))
    tall = layout_of(5, 7, NAMES, KIND, SIZE * [1, 1, 0] + [0, 0, TALLEST + 0.1])
    assert len(bare.piece) == len(tall.piece) == 0
    frames = frames_of(bare, furnished(bare, [], KIND[:0]), *cameras_of(bare, 5, 7, 2), 4, 4)
    assert set(np.unique(frames.classes)) <= {0, 1, 2}
    assert np.isfinite(frames.depth).all()


def test_a_clean_sensor_changes_nothing_and_a_noisy_one_what_it_says() -> None:
    _, _, frames = drawn(0, views=4, height=24, width=32)
    for name, clean in zip(PosedFrames._fields, Sensor().scanned(frames, 0, 0), strict=True):
        np.testing.assert_allclose(clean, getattr(frames, name), atol=1e-6, err_msg=name)
    noisy = Sensor(depth=0.02, missing=0.25, grain=0.05, tilt=0.2).scanned(frames, 0, 0)
    there = noisy.depth > 0
    assert (~there).mean() == pytest.approx(0.25, abs=0.01)
    error = ((noisy.depth - frames.depth) / frames.depth**2)[there]
    assert error.std() == pytest.approx(0.02, rel=0.1)
    np.testing.assert_allclose(np.linalg.norm(noisy.normal, axis=1), 1, atol=1e-5)
    shifted = Sensor(shift=0.1).scanned(frames, 0, 0).pictures
    for channel in range(3):  # of one gain and one bias
        inside = (shifted[:, channel] > 0) & (shifted[:, channel] < 1)
        slope, start = np.polyfit(frames.pictures[:, channel][inside], shifted[:, channel][inside], 1)
        assert 0.9 <= slope <= 1.1
        assert -0.1 <= start <= 0.1
    np.testing.assert_array_equal(frames.classes, noisy.classes)
    assert not (Sensor(missing=1).scanned(frames, 0, 0).depth > 0).any()
    for wrong in ({"missing": 1.1}, {"depth": -1.0}, {"grain": float("nan")}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Sensor(**wrong)
