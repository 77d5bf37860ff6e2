"""Rooms: grids, distances and views agree with one another, and no object meets another one or a camera."""

import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.datamodules.rendered.rooms import (
    CLASSES,
    METRES,
    RoomGrids,
    Rooms,
    RoomSpace,
    RoomViews,
    cast,
    colours,
    signed_distances,
)

SPACE, NUMBERS = RoomSpace(side=24, cells=2, fewest=0, most=4), np.arange(12)


@pytest.fixture(scope="module")
def drawn() -> tuple[Rooms, RoomGrids, RoomViews]:
    rooms = SPACE.rooms(0, NUMBERS)
    return rooms, SPACE.grids(rooms), SPACE.views(rooms, 0, NUMBERS, count=3, height=12, width=16)


def test_a_ray_ends_on_a_surface_and_meets_none_before(drawn: tuple[Rooms, RoomGrids, RoomViews]) -> None:
    rooms, _, views = drawn
    lens = np.linalg.inv(views.intrinsics.astype(float))
    y, x = np.mgrid[:12, :16]
    own = lens @ np.stack([x, y, np.ones_like(x)]).reshape(3, -1)
    own /= np.linalg.norm(own, axis=0)
    for view in range(3):
        ray = np.einsum("bji,jn->bin", views.rotation[:, view], own).astype(np.float32)
        length, body = cast(rooms, views.place[:, view], ray)
        np.testing.assert_allclose(length.reshape(-1, 12, 16), views.depth[:, view], rtol=1e-4)
        points = views.place[:, view, :, None] + length[:, None] * ray
        distance = signed_distances(rooms, points)
        own_distance = np.take_along_axis(distance, body[:, None], axis=1)[:, 0]
        assert np.abs(own_distance).max() < 1e-3
        assert distance.min() > -1e-3
        for share in np.linspace(0, 0.99, 12):
            before = views.place[:, view, :, None] + np.float32(share) * length[:, None] * ray
            assert signed_distances(rooms, before).min() > -1e-3
        shown = colours(rooms, points, body).reshape(-1, 3, 12, 16)
        np.testing.assert_allclose(shown, views.images[:, view], atol=1e-3)


def test_distances_are_those_to_the_nearest_of_many_points_on_a_surface() -> None:
    one = np.ones((1, 1), np.float32)
    turn = np.float32(0.6)
    centre, half = np.array([[[2.0, 1.9, 0.8]]], np.float32), np.array([[[0.5, 0.3, 0.6]]], np.float32)
    rooms = SPACE.rooms(0, np.arange(1))
    generator = np.random.default_rng(0)
    points = generator.uniform(1, 3, (1, 3, 40)).astype(np.float32)
    share = np.linspace(-1, 1, 81)
    u, v = (part.ravel() for part in np.meshgrid(share, share))
    angle, disc = np.pi * u, np.sqrt((v + 1) / 2)
    faces = []
    for axis in range(3):
        for sign in (-1, 1):
            face = np.empty((3, u.size))
            face[axis], face[(axis + 1) % 3], face[(axis + 2) % 3] = sign, u, v
            faces.append(face)
    box = half[0, 0, :, None] * np.concatenate(faces, axis=1)
    sphere = 0.5 * np.stack([np.sqrt(1 - v**2) * np.cos(angle), np.sqrt(1 - v**2) * np.sin(angle), v])
    side = np.stack([0.5 * np.cos(angle), 0.5 * np.sin(angle), 0.6 * v])
    caps = [np.stack([0.5 * disc * np.cos(angle), 0.5 * disc * np.sin(angle), 0.6 * s * one[0, 0] + 0 * u])
            for s in (-1, 1)]  # fmt: skip
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    for kind, surface in enumerate((box, sphere, np.concatenate([side, *caps], axis=1))):
        own = half if kind == 0 else np.array([[[0.5, 0.5, 0.5 if kind == 1 else 0.6]]], np.float32)
        single = rooms._replace(
            kind=np.array([[kind]]), centre=centre, half=own, cos=np.cos(turn) * one, sin=np.sin(turn) * one
        )
        there = rotation @ surface + centre[0, 0, :, None]
        wanted = np.sqrt(((points[0, :, :, None] - there[:, None]) ** 2).sum(axis=0)).min(axis=1)
        found = signed_distances(single, points)[0, 1]
        np.testing.assert_allclose(np.abs(found), wanted, atol=0.03)
        assert (found < 0).any()
        assert (found > 0).any()


def test_grids_say_what_is_at_the_middle_of_a_voxel(drawn: tuple[Rooms, RoomGrids, RoomViews]) -> None:
    rooms, grids, _ = drawn
    voxel = METRES / SPACE.side
    assert grids.alpha.shape == grids.classes.shape == (12, 24, 24, 24)
    generator = np.random.default_rng(0)
    for row, d, h, w in generator.integers([12, 24, 24, 24], size=(400, 4)):
        point = (voxel * (np.array([w, h, d]) + 0.5)).astype(np.float32)
        distance = signed_distances(Rooms(*(field[row : row + 1] for field in rooms)), point[None, :, None])[0, :, 0]
        body = int(distance.argmin())
        inside = (np.array([d, h, w]) < grids.sides[row]).all()
        alpha = float(np.clip(0.5 - distance.min() / voxel, 0, 1)) if inside else 0.0
        assert grids.alpha[row, d, h, w] == pytest.approx(alpha, abs=1e-4)
        name = "empty" if alpha < 0.5 else "room" if body == 0 else CLASSES[rooms.kind[row, body - 1] + 2]
        if abs(alpha - 0.5) > 1e-3:
            assert CLASSES[grids.classes[row, d, h, w]] == name
        assert alpha > 0 or (grids.colour[row, :, d, h, w] == 0).all()
    # Walls are one voxel thick.
    for row, (depth, height, width) in enumerate(grids.sides):
        assert (grids.classes[row, 0, :height, :width] == 1).all()
        assert (grids.classes[row, depth - 1, :height, :width] == 1).all()
        assert (grids.alpha[row, depth:] == 0).all()
        assert (grids.alpha[row, :, :, width:] == 0).all()


def test_objects_stand_apart_below_the_cameras_and_inside_the_room() -> None:
    for cells in (1, 2, 3):
        space = RoomSpace(side=16, cells=cells, fewest=cells**2, most=cells**2)
        rooms = space.rooms(3, np.arange(40))
        reach = np.where(
            rooms.kind[..., None] == 0, np.hypot(rooms.half[..., :1], rooms.half[..., 1:2]), rooms.half[..., :1]
        )[..., 0]
        for one in range(cells**2):
            for other in range(one):
                apart = np.hypot(*np.moveaxis(rooms.centre[:, one, :2] - rooms.centre[:, other, :2], 1, 0))
                assert (apart > reach[:, one] + reach[:, other] - 1e-4).all()
        wall, low, high = rooms.wall[:, None], rooms.centre[..., :2] - reach[..., None], rooms.centre[..., :2]
        assert (low >= wall[..., None] - 1e-4).all()
        assert (high + reach[..., None] <= (rooms.size[:, None, :2] - wall[..., None]) + 1e-4).all()
        np.testing.assert_allclose(
            rooms.centre[..., 2] - rooms.half[..., 2], np.broadcast_to(wall, reach.shape), rtol=1e-4
        )
        top = (rooms.centre + rooms.half)[..., 2].max(axis=1)
        place = space.views(rooms, 3, np.arange(40), 4, 2, 2).place
        assert (place[..., 2].min(axis=1) > top).all()
        assert (np.bincount(rooms.kind.ravel(), minlength=3) > 0).all()


def test_a_room_depends_on_its_number_alone_and_views_keep_their_axes() -> None:
    many, few = SPACE.rooms(5, np.arange(9)), SPACE.rooms(5, np.array([7, 2]))
    for field, own in zip(many, few, strict=True):
        np.testing.assert_array_equal(field[[7, 2]], own)
    np.testing.assert_array_equal(SPACE.grids(many).alpha[7], SPACE.grids(few).alpha[0])
    views = SPACE.views(few, 5, np.array([7, 2]), 5, 4, 4)
    np.testing.assert_array_equal(SPACE.views(many, 5, np.arange(9), 5, 4, 4).images[2], views.images[1])
    product = views.rotation @ views.rotation.swapaxes(2, 3)
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(3), product.shape), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(views.rotation), 1, atol=1e-6)
    assert (views.rotation[:, :, 1, 2] < 0).all()  # what is down in a picture is down in the room


def test_rooms_without_objects_and_settings_that_do_not_fit() -> None:
    bare = RoomSpace(side=8, cells=1, fewest=0, most=1)
    rooms = bare.rooms(0, np.arange(30))
    assert (rooms.kind < 0).any()
    nothing = Rooms(*(field[rooms.kind[:, 0] < 0] for field in rooms))
    assert set(np.unique(bare.grids(nothing).classes)) == {0, 1}
    for settings, said in (({"side": 7}, "side=7"), ({"cells": 0}, "cells=0"), ({"fewest": 5}, "fewest=5"),
                           ({"most": 5}, "most=5"), ({"most": 0, "fewest": 0}, "most=0")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            RoomSpace(**settings).require()
