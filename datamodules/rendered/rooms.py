"""Rooms with boxes, spheres and cylinders on their floor: exact grids of colour, opacity and class, and posed views.

Distances and the lengths of rays are closed forms, so that a grid and all views of a room show the same to rounding.
Colours are functions of a place and a body, and say nothing of its kind.
Coordinates: x to the right, y to the front, z up, in metres from a corner of the room. A pixel's middle lies at whole
numbers.
Shapes: B rooms, K places for objects, K + 1 bodies with the room as the first, V views of each room, H W picture, N
rays of a view or points, D H W voxels along z, y and x.
"""

from typing import NamedTuple

import numpy as np

from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.rendered.draws import Draws
from lightspan.datamodules.rendered.pairs import intrinsics

KINDS = ("box", "sphere", "cylinder")
CLASSES = ("empty", "room", *KINDS)
"""What the numbers of classes mean."""
METRES = 4.0  # of the longest side that a room may have
LEAST_SIDE, LEAST_HEIGHT, HEIGHT = 0.75, 0.625, 0.75  # of a room, as shares of METRES
TALLEST = 0.5  # of a room's height; cameras are above
FAR = np.float32(np.inf)


class Rooms(NamedTuple):
    """Bodies of B rooms.

    kind: int64 [B, K], a place in `KINDS`; -1 for an object that is not there.
    centre, half: float32 [B, K, 3], the middle, and half of the sides or the radius; of a cylinder x and y have the
        radius and z half of the height.
    cos, sin: float32 [B, K], of the turn about the vertical axis.
    size: float32 [B, 3], of the room with its walls.
    wall: float32 [B], thickness of walls, floor and ceiling.
    base: float32 [B, K + 1, 3], the mean colour.
    wave: float32 [B, K + 1, 3, 4], of each channel the frequencies along x, y and z and the phase.
    """

    kind: np.ndarray
    centre: np.ndarray
    half: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    size: np.ndarray
    wall: np.ndarray
    base: np.ndarray
    wave: np.ndarray


class RoomGrids(NamedTuple):
    """What is in each voxel of the cube of METRES a side whose first corner is the room's.

    colour: float32 [B, 3, D, H, W], in [0, 1], of the body with the largest share; 0 where alpha is.
    alpha: float32 [B, D, H, W], in [0, 1], about the share of the voxel that bodies fill.
    classes: int64 [B, D, H, W], a place in `CLASSES`, empty where less than half is filled.
    sides: int64 [B, 3], voxels of the room along D, H and W; what is beyond them is no part of it.
    """

    colour: np.ndarray
    alpha: np.ndarray
    classes: np.ndarray
    sides: np.ndarray


class RoomViews(NamedTuple):
    """What cameras inside of B rooms see.

    images: float32 [B, V, 3, H, W], in [0, 1].
    depth: float32 [B, V, H, W], length of the ray in metres.
    place: float32 [B, V, 3]; rotation: float32 [B, V, 3, 3], whose rows are the camera's axes: right, down, ahead.
    intrinsics: float32 [3, 3], of all cameras.
    """

    images: np.ndarray
    depth: np.ndarray
    place: np.ndarray
    rotation: np.ndarray
    intrinsics: np.ndarray


class RoomSpace(NamedTuple):
    """All rooms that may be drawn.

    side: voxels of METRES.
    cells: of the floor along each side; each has one object at most, so that none meet.
    fewest, most: objects.
    """

    side: int = 32
    cells: int = 2
    fewest: int = 2
    most: int = 4

    def require(self) -> None:
        """Raises: UserError for settings that do not fit."""
        require_in("[8, inf)", side=self.side)
        require_in("[1, inf)", cells=self.cells, most=self.most)
        require_in(f"[0, {self.most}]", fewest=self.fewest)
        require_in(f"[1, {self.cells**2}]", most=self.most)
        require_numbers(self.side**3, side=self.side)
        require_numbers(self.cells**2, cells=self.cells)

    def rooms(self, seed: int, numbers: np.ndarray) -> Rooms:
        """The rooms with these numbers, int64 [B]."""
        draws, K, voxel = Draws(seed, numbers, 31), self.most, np.float32(METRES / self.side)
        flat = np.round(self.side * draws.between(LEAST_SIDE, 1.0, 2))
        high = np.round(self.side * draws.between(LEAST_HEIGHT, HEIGHT, 1))
        size = voxel * np.concatenate([flat, high], axis=1).astype(np.float32)
        there = np.arange(K) < self.fewest + draws.integers(self.most - self.fewest + 1)[:, None]
        kind = np.where(there, draws.integers(len(KINDS), K), -1)
        cell = draws.uniform(self.cells**2).argsort(axis=1)[:, :K]
        room_of_cell = (size[:, :2] - 2 * voxel) / self.cells
        reach = (room_of_cell.min(axis=1) / 2)[:, None]  # no object is farther from its middle, seen from above
        radius = reach * draws.between(0.65, 0.9, K)
        slack = draws.between(-1, 1, K, 2) * (room_of_cell[:, None] / 2 - radius[..., None])
        at = np.stack([cell % self.cells, cell // self.cells], axis=2) + np.float32(0.5)
        middle = voxel + at * room_of_cell[:, None] + slack
        shape, turn = draws.between(0.6, 1.0, K), draws.between(0, np.pi, K)  # from a long box to nearly a cube
        length = np.sqrt(1 + shape**2)
        tall = radius * draws.between(0.7, 1.1, K)
        sphere, box = kind == 1, kind == 0
        half = np.stack(
            [
                np.where(box, radius / length, radius),
                np.where(box, radius * shape / length, radius),
                np.minimum(np.where(sphere, radius, tall), (np.float32(TALLEST) * size[:, 2:] - voxel) / 2),
            ],
            axis=2,
        )
        # A sphere that would be too tall is smaller in all directions.
        half = np.where(sphere[..., None], half.min(axis=2, keepdims=True), half)
        centre = np.concatenate([middle, voxel + half[..., 2:]], axis=2)
        base = draws.between(0.2, 0.8, K + 1, 3)
        wave = np.concatenate([draws.between(-6, 6, K + 1, 3, 3), draws.between(0, 2 * np.pi, K + 1, 3, 1)], axis=3)
        absent = ~there[..., None]
        centre, half = (np.where(absent, np.float32(0), field).astype(np.float32) for field in (centre, half))
        wall = np.full(len(numbers), voxel, np.float32)
        return Rooms(kind, centre, half, np.cos(turn), np.sin(turn), size, wall, base, wave)

    def grids(self, rooms: Rooms) -> RoomGrids:
        """Each room by itself on the grid of all."""
        voxel = np.float32(METRES / self.side)
        middle = voxel * (np.arange(self.side, dtype=np.float32) + np.float32(0.5))
        z, y, x = (axis.ravel() for axis in np.meshgrid(middle, middle, middle, indexing="ij"))
        points = np.broadcast_to(np.stack([x, y, z]), (len(rooms.kind), 3, len(x)))
        distance = signed_distances(rooms, points)
        body, nearest = distance.argmin(axis=1), distance.min(axis=1)
        sides = np.rint(rooms.size[:, ::-1] / voxel).astype(np.int64)
        inside = (points < rooms.size[:, :, None]).all(axis=1)
        alpha = np.where(inside, np.clip(np.float32(0.5) - nearest / voxel, 0, 1), np.float32(0))
        colour = np.where(alpha[:, None] > 0, colours(rooms, points, body), np.float32(0))
        named = np.concatenate([np.ones_like(rooms.kind[:, :1]), rooms.kind + 2], axis=1)
        classes = np.where(alpha >= 0.5, np.take_along_axis(named, body, axis=1), 0)
        cube = (len(points), *[self.side] * 3)
        return RoomGrids(colour.reshape(len(points), 3, *cube[1:]), alpha.reshape(cube), classes.reshape(cube), sides)

    def views(self, rooms: Rooms, seed: int, numbers: np.ndarray, count: int, height: int, width: int) -> RoomViews:
        """`count` views of each room, from anywhere above the objects, in all directions and down.

        Args:
            seed, numbers: those of the rooms.
        """
        draws, B = Draws(seed, numbers, 32), len(numbers)
        share = np.array([[0.15, 0.15, 0.6], [0.85, 0.85, 0.9]], np.float32)
        place = rooms.size[:, None] * (share[0] + (share[1] - share[0]) * draws.uniform(count, 3))
        yaw, pitch = draws.between(0, 2 * np.pi, count), draws.between(np.pi / 18, np.pi / 3, count)
        cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
        axes = (sy, -cy, np.zeros_like(cy)), (-sp * cy, -sp * sy, -cp), (cp * cy, cp * sy, -sp)
        rotation = np.stack([np.stack(axis, axis=2) for axis in axes], axis=2)
        lens = intrinsics(height, width)
        (fx, _, cx), (_, fy, cy_), _ = lens
        v, u = np.mgrid[:height, :width].astype(np.float32)
        own = np.stack([(u - cx) / fx, (v - cy_) / fy, np.ones_like(u)]).reshape(3, -1)
        own = own / np.sqrt((own**2).sum(axis=0))
        images, depths = np.empty((B, count, 3, height * width), np.float32), np.empty((B, count, height * width))
        for view in range(count):
            ray = np.einsum("bji,jn->bin", rotation[:, view], own)
            length, body = cast(rooms, place[:, view], ray)
            points = place[:, view, :, None] + length[:, None] * ray
            images[:, view], depths[:, view] = colours(rooms, points, body), length
        shape = (B, count, height, width)
        pictures = images.reshape(B, count, 3, height, width)
        return RoomViews(pictures, depths.astype(np.float32).reshape(shape), place, rotation, lens)


def signed_distances(rooms: Rooms, points: np.ndarray) -> np.ndarray:
    """Of points [B, 3, N] to the surface of each body, below 0 inside: float32 [B, K + 1, N], infinite for an object
    that is not there. The room's body is its walls.
    """
    inner = (rooms.size / 2 - rooms.wall[:, None])[:, :, None]
    found = [-_box_distance(points - rooms.size[:, :, None] / 2, inner)]
    for k in range(rooms.kind.shape[1]):
        kind, half, local = rooms.kind[:, k, None], rooms.half[:, k, :, None], _local(rooms, k, points)
        from_axis = np.sqrt(local[:, 0] ** 2 + local[:, 1] ** 2)
        round_ = np.stack([from_axis - half[:, 0], np.abs(local[:, 2]) - half[:, 2]], axis=1)
        sphere = np.sqrt((local**2).sum(axis=1)) - half[:, 0]
        distance = np.where(kind == 0, _box_distance(local, half), np.where(kind == 1, sphere, _beyond(round_)))
        found.append(np.where(kind < 0, FAR, distance))
    return np.stack(found, axis=1).astype(np.float32)


def _box_distance(local: np.ndarray, half: np.ndarray) -> np.ndarray:
    return _beyond(np.abs(local) - half)


def _beyond(over: np.ndarray) -> np.ndarray:
    """The distance to a body that lies where all of `over` [B, n, N] are below 0, which are distances to its sides."""
    outside = np.sqrt((np.maximum(over, 0) ** 2).sum(axis=1))
    return outside + np.minimum(over.max(axis=1), 0)


def cast(rooms: Rooms, place: np.ndarray, ray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(length float32 [B, N], body int64 [B, N]): where rays first meet a body.

    All bodies are convex, and the room is seen from inside: a ray enters where it has entered all that a body is the
    intersection of, and leaves where it leaves the first of these.

    Args:
        place: from where, [B, 3], inside the room and outside of all objects.
        ray: float32 [B, 3, N], of length 1.
    """
    start = (place - rooms.size / 2)[:, :, None]
    inner = (rooms.size / 2 - rooms.wall[:, None])[:, :, None]
    _, length = _between(start, ray, inner)
    body = np.zeros(length.shape, np.int64)
    for k in range(rooms.kind.shape[1]):
        kind, half = rooms.kind[:, k, None], rooms.half[:, k, :, None]
        own, way = _local(rooms, k, place[:, :, None]), _turned(rooms, k, ray)
        box = _between(own, way, half)
        sphere = _around(own, way, half[:, 0])
        side, caps = _around(own[:, :2], way[:, :2], half[:, 0]), _between(own[:, 2:], way[:, 2:], half[:, 2:])
        round_ = np.maximum(side[0], caps[0]), np.minimum(side[1], caps[1])
        enters, leaves = (
            np.where(kind == 0, a, np.where(kind == 1, b, c)) for a, b, c in zip(box, sphere, round_, strict=True)
        )
        hit = (kind >= 0) & (enters < leaves) & (enters > 0) & (enters < length)
        length, body = np.where(hit, enters, length), np.where(hit, k + 1, body)
    return length.astype(np.float32), body


def _between(start: np.ndarray, way: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays enter and leave what lies between -half and half along all of n axes, [B, N] each."""
    # 1e-20 stands for 0: a ray along a slab has always been in it, or never is.
    inverse = 1 / (way + np.float32(1e-20))
    middle, reach = -start * inverse, half * np.abs(inverse)
    return (middle - reach).max(axis=1), (middle + reach).min(axis=1)


def _around(start: np.ndarray, way: np.ndarray, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays enter and leave a ball of n axes, [B, N] each; a ray that misses it leaves before it enters."""
    a = (way**2).sum(axis=1) + np.float32(1e-20)
    b, c = (start * way).sum(axis=1), (start**2).sum(axis=1) - radius**2
    under = b**2 - a * c
    root = np.sqrt(np.maximum(under, 0))
    return np.where(under > 0, (-b - root) / a, FAR), np.where(under > 0, (-b + root) / a, -FAR)


def colours(rooms: Rooms, points: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Of points [B, 3, N] on or in these bodies, float32 [B, 3, N] in [0, 1]."""
    base = np.take_along_axis(rooms.base, body[..., None], axis=1)
    wave = np.take_along_axis(rooms.wave, body[..., None, None], axis=1)  # [B, N, 3, 4]
    swing = wave[..., 3] + sum(wave[..., axis] * points[:, axis, :, None] for axis in range(3))
    return np.clip(base + np.float32(0.2) * np.sin(swing), 0, 1).transpose(0, 2, 1)


def _turned(rooms: Rooms, k: int, vectors: np.ndarray) -> np.ndarray:
    """Vectors [B, 3, N] as object k sees them."""
    cos, sin = rooms.cos[:, k, None], rooms.sin[:, k, None]
    x, y, z = vectors[:, 0], vectors[:, 1], vectors[:, 2]
    return np.stack([cos * x + sin * y, cos * y - sin * x, z], axis=1)


def _local(rooms: Rooms, k: int, points: np.ndarray) -> np.ndarray:
    """Points [B, 3, N] from the middle of object k, along its own axes."""
    return _turned(rooms, k, points - rooms.centre[:, k, :, None])
