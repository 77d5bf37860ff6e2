"""Furnished rooms: pieces of furniture of triangles on a floor, and what posed cameras see of them, to rounding.

A ray of a camera is cut with every triangle that may cover its pixel, and ends at the nearest; the room's six sides are
closed forms. Surfaces are dull: their light depends on their direction and not on the eye, so that all views of a point
have the same colour.
Coordinates: x to the right, y to the front, z up, in metres from a corner of the room, between its walls. A pixel's
middle lies at whole numbers.
Shapes: K pieces of a room, F triangles of all of them, V views of a room, H W picture, N rays of a view.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lightspan.core.ranges import require_in
from lightspan.datamodules.points.shapes import Shape
from lightspan.datamodules.rendered.cameras import PosedFrames, pixel_rays, unit
from lightspan.datamodules.rendered.draws import Draws
from lightspan.datamodules.rendered.pairs import intrinsics

SURFACES = ("floor", "ceiling", "wall")
"""What a room itself is made of; furniture of kind k is of class len(SURFACES) + k."""
USES: dict[str, tuple[tuple[str, int], ...]] = {
    "living room": (("sofa", 2), ("armchair", 2), ("table", 1), ("shelf", 1), ("plant", 2), ("lamp", 1), ("chair", 1)),
    "bedroom": (("bed", 1), ("cabinet", 2), ("lamp", 1), ("chair", 1), ("shelf", 1), ("plant", 1)),
    "kitchen": (("appliance", 3), ("cabinet", 2), ("table", 1), ("chair", 4)),
    "office": (("table", 2), ("chair", 2), ("shelf", 2), ("lamp", 1), ("plant", 1), ("cabinet", 1)),
    "bathroom": (("sanitary", 4), ("cabinet", 1), ("plant", 1)),
}
"""What rooms are for, and the most pieces of each kind that they have, those first that need the most space."""
AT_WALL = ("sofa", "bed", "cabinet", "shelf", "sanitary", "appliance")
LEAST_SIDE, MOST_SIDE, LEAST_HEIGHT, MOST_HEIGHT = 3.0, 4.5, 2.4, 2.8
TALLEST = 2.2  # of furniture, below which a camera under the ceiling is free
GAP = 0.05  # metres between pieces, and from walls
TRIES = 24  # places drawn for a piece or a camera before it is given up, or goes under the ceiling
CLEAR = 0.15  # metres from a camera to any piece
PAIRS = 2**21  # of rays and triangles at once


class RoomPlan(NamedTuple):
    """A room and where its pieces stand.

    use: a place in `USES`.
    size: float64 [3], between the walls.
    piece: int64 [K], the number of each piece.
    turn: int64 [K], quarter turns anticlockwise as seen from above.
    place: float64 [K, 2], of the middle on the floor.
    half: float64 [K, 3], half of the sides as they stand, of z the whole height.
    base: float64 [3, 3], the colour of each of `SURFACES`. wave: [3, 4], of its brightness the frequencies along x, y
        and z and the phase.
    """

    use: int
    size: np.ndarray
    piece: np.ndarray
    turn: np.ndarray
    place: np.ndarray
    half: np.ndarray
    base: np.ndarray
    wave: np.ndarray


class Surfaces(NamedTuple):
    """Triangles of a room's furniture: corners float64 [F 3 3], their colours [F 3 3] in [0, 1], classes int64 [F]."""

    corners: np.ndarray
    colours: np.ndarray
    classes: np.ndarray


def layout_of(seed: int, number: int, kinds: Sequence[str], kind: np.ndarray, size: np.ndarray) -> RoomPlan:
    """The room with this number: pieces are drawn for its use, and stand where one of some random places is free,
    beds and the like with their backs to a wall.

    Args:
        kinds: names of the kinds of pieces.
        kind: of each piece that may be drawn, int64 [P].
        size: its width, depth and height, [P, 3]; a piece taller than `TALLEST` is never drawn.
    """
    draws = Draws(seed, np.array([number]), 41)
    use = int(draws.integers(len(USES))[0])
    share = draws.uniform(3)[0].astype(float)
    least = np.array([LEAST_SIDE, LEAST_SIDE, LEAST_HEIGHT])
    room = least + share * (np.array([MOST_SIDE, MOST_SIDE, MOST_HEIGHT]) - least)
    chosen, turns, places, halves = list[int](), list[int](), list[np.ndarray](), list[np.ndarray]()
    for name, most in list(USES.values())[use]:
        own = np.flatnonzero((kind == kinds.index(name)) & (size[:, 2] <= TALLEST))
        for _ in range(1 + int(draws.integers(most)[0]) if len(own) else 0):
            piece = int(own[draws.integers(len(own))[0]])
            turn, where = draws.integers(4, TRIES)[0], draws.uniform(TRIES, 2)[0].astype(float)
            for quarter, at in zip(turn.tolist(), where, strict=True):
                half = np.array([*size[piece, [1, 0] if quarter % 2 else [0, 1]] / 2, size[piece, 2]])
                free = room[:2] / 2 - half[:2] - GAP
                if (free < 0).any():
                    continue
                middle = (2 * at - 1) * free
                if name in AT_WALL:  # at quarter 0 the back looks to where y is large
                    axis, sign = ((1, 1), (0, -1), (1, -1), (0, 1))[quarter]
                    middle[axis] = sign * free[axis]
                middle += room[:2] / 2
                if all(
                    (np.abs(middle - p) > half[:2] + h[:2] + GAP).any() for p, h in zip(places, halves, strict=True)
                ):
                    chosen.append(piece)
                    turns.append(quarter)
                    places.append(middle)
                    halves.append(half)
                    break
    base = draws.between(0.35, 0.85, 3, 3)[0].astype(float)
    wave = np.concatenate([draws.between(-6, 6, 3, 3)[0], draws.between(0, 2 * np.pi, 3, 1)[0]], axis=1)
    return RoomPlan(
        use,
        room,
        np.array(chosen, np.int64),
        np.array(turns, np.int64),
        np.array(places).reshape(-1, 2),
        np.array(halves).reshape(-1, 3),
        base,
        wave.astype(float),
    )


def furnished(layout: RoomPlan, shapes: Sequence[Shape], kind: np.ndarray) -> Surfaces:
    """The triangles of a layout.

    Args:
        shapes: the surfaces of its K pieces, standing on z = 0 around x = y = 0.
        kind: of each of them, int64 [K].
    """
    corners: list[np.ndarray] = [np.zeros((0, 3, 3))]
    colours: list[np.ndarray] = [np.zeros((0, 3, 3))]
    classes: list[np.ndarray] = [np.zeros(0, np.int64)]
    for shape, own, turn, place in zip(shapes, kind, layout.turn, layout.place, strict=True):
        cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[turn]
        x, y, z = np.moveaxis(shape.xyz.astype(float), -1, 0)
        corners.append(np.stack([cos * x - sin * y + place[0], sin * x + cos * y + place[1], z], axis=-1))
        grey = np.full(shape.xyz.shape, 0.6)
        colours.append(grey if shape.colour is None else shape.colour / 255.0)
        classes.append(np.full(len(shape.xyz), len(SURFACES) + own))
    return Surfaces(*(np.concatenate(parts) for parts in (corners, colours, classes)))


def cameras_of(layout: RoomPlan, seed: int, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(place float32 [V, 3], rotation float32 [V, 3, 3]): at the height of eyes and apart from all pieces, where one of
    some random places is so, else under the ceiling; they look at anywhere in the middle of the room.
    """
    draws, half = Draws(seed, np.array([number]), 42), layout.half
    where = draws.uniform(count, TRIES, 3)[0].astype(float)
    aims = draws.uniform(count, 3)[0].astype(float)
    low, high = np.array([0.3, 0.3, 1.1]), np.array([layout.size[0] - 0.3, layout.size[1] - 0.3, 1.8])
    tried = low + where * (high - low)
    apart = np.abs(tried[:, :, None, :2] - layout.place) > half[:, :2] + CLEAR
    free = (apart.any(axis=3) | (tried[..., None, 2] > half[:, 2] + CLEAR)).all(axis=2)
    place = tried[np.arange(count), free.argmax(axis=1)]
    place[~free.any(axis=1), 2] = layout.size[2] - 0.1
    aim = layout.size * np.array([0.25, 0.25, 0.0]) + aims * layout.size * np.array([0.5, 0.5, 0.4])
    ahead = unit(aim - place)
    flat = unit(np.stack([ahead[:, 1], -ahead[:, 0], np.zeros(count)], axis=1) + np.array([1e-12, 0, 0]))
    rotation = np.stack([flat, np.cross(ahead, flat), ahead], axis=1)
    return place.astype(np.float32), rotation.astype(np.float32)


def frames_of(
    layout: RoomPlan, surfaces: Surfaces, place: np.ndarray, rotation: np.ndarray, height: int, width: int
) -> PosedFrames:
    """What these cameras see."""
    lens = intrinsics(height, width)
    own = pixel_rays(lens, height, width)
    seen = [_view(layout, surfaces, p.astype(float), r.astype(float), own, lens, height, width)
            for p, r in zip(place, rotation, strict=True)]  # fmt: skip
    pictures, depth, normal, classes = (np.stack(part) for part in zip(*seen, strict=True))
    shape = (height, width)
    return PosedFrames(
        np.moveaxis(pictures, 2, 1).reshape(-1, 3, *shape).astype(np.float32),
        depth.reshape(-1, *shape).astype(np.float32),
        np.moveaxis(normal, 2, 1).reshape(-1, 3, *shape).astype(np.float32),
        classes.reshape(-1, *shape),
        place,
        rotation,
        lens,
    )


def _view(
    layout: RoomPlan,
    surfaces: Surfaces,
    place: np.ndarray,
    rotation: np.ndarray,
    own: np.ndarray,
    lens: np.ndarray,
    height: int,
    width: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(colour [N, 3], length [N], normal [N, 3], class [N])."""
    rays = own @ rotation
    length, normal, classes = _sides(layout, place, rays)
    points = place + length[:, None] * rays
    swing = layout.wave[classes, 3] + (layout.wave[classes, :3] * points).sum(axis=1)
    colour = layout.base[classes] + 0.08 * np.sin(swing)[:, None]
    inside = (surfaces.corners - place) @ rotation.T
    at, triangle, where = _nearest(inside, own, lens, height, width)
    nearer = where[:, 0] < length[at]
    at, triangle, where = at[nearer], triangle[nearer], where[nearer]
    corners = surfaces.corners[triangle]
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length[at], normal[at], classes[at] = where[:, 0], unit(across), surfaces.classes[triangle]
    shares = np.stack([1 - where[:, 1] - where[:, 2], where[:, 1], where[:, 2]], axis=1)
    colour[at] = np.einsum("nk,nkc->nc", shares, surfaces.colours[triangle])
    away = (normal * rays).sum(axis=1, keepdims=True) > 0
    # Light from above and a little from one side, and as much of it on either face of a sheet.
    light = 0.7 + 0.3 * np.abs(normal @ np.array([0.48, 0.36, 0.8]))
    return np.clip(colour * light[:, None], 0, 1), length, np.where(away, -normal, normal), classes


def _sides(layout: RoomPlan, place: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where rays from inside meet the room: (length [N], normal [N, 3], a place in `SURFACES` [N])."""
    safe = np.where(np.abs(rays) < 1e-12, 1e-12, rays)
    lengths = np.where(safe > 0, layout.size - place, -place) / safe
    axis = lengths.argmin(axis=1)
    rows = np.arange(len(rays))
    normal = np.zeros(rays.shape)
    normal[rows, axis] = -np.sign(safe[rows, axis])
    return lengths[rows, axis], normal, np.where(axis < 2, 2, np.where(normal[:, 2] > 0, 0, 1))


def _nearest(
    corners: np.ndarray, rays: np.ndarray, lens: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of rays from a camera the nearest triangle: (ray [M], triangle [M], [M, 3] length and the shares of the second
    and third corner), for rays that meet one.

    Only rays through the box around a triangle's picture are cut with it; all, if it reaches behind the camera.

    Args:
        corners: as the camera sees them, float64 [F 3 3].
        rays: of its pixels in rows, [N, 3] of length 1.
    """
    (fx, _, cx), (_, fy, cy), _ = lens.astype(float)
    # A triangle is out of sight if it is beyond one of the four sides of what a picture shows, or behind.
    x, y, z = np.moveaxis(corners, -1, 0)
    sides = fx * x + (cx + 1) * z, (width - cx) * z - fx * x, fy * y + (cy + 1) * z, (height - cy) * z - fy * y, z
    sight = np.flatnonzero(np.all([side.max(axis=1) > 0 for side in sides], axis=0))
    corners = corners[sight]
    first, second, third = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    depth = corners[..., 2]
    ahead = depth.min(axis=1) > 1e-6
    safe = np.where(ahead[:, None], depth, 1.0)
    u, v = fx * corners[..., 0] / safe + cx, fy * corners[..., 1] / safe + cy
    edge = 1e-6  # a pixel's middle that lies on the box is in it
    left, right = (np.clip(x, -1, width).astype(int) for x in (np.ceil(u.min(1) - edge), np.floor(u.max(1) + edge)))
    top, bottom = (np.clip(x, -1, height).astype(int) for x in (np.ceil(v.min(1) - edge), np.floor(v.max(1) + edge)))
    left, top = np.where(ahead, left.clip(0), 0), np.where(ahead, top.clip(0), 0)
    right = np.where(ahead, right.clip(None, width - 1), width - 1)
    bottom = np.where(ahead, bottom.clip(None, height - 1), height - 1)
    wide, high = (right - left + 1).clip(0), (bottom - top + 1).clip(0)
    count = np.where(depth.max(axis=1) > 1e-6, wide * high, 0)
    some = np.flatnonzero(count)
    ends = count[some].cumsum()
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    begin = 0
    while begin < len(some):  # as many triangles at once as have few enough pairs, at least one
        before = ends[begin - 1] if begin else 0
        stop = max(int(np.searchsorted(ends, before + PAIRS, "right")), begin + 1)
        own = some[begin:stop]
        triangle = np.repeat(own, count[own])
        place = np.arange(len(triangle)) - np.repeat(count[own].cumsum() - count[own], count[own])
        pixel = (top[triangle] + place // wide[triangle]) * width + left[triangle] + place % wide[triangle]
        hit, where = _cut(first[triangle], second[triangle], third[triangle], rays[pixel])
        found.append((pixel[hit], sight[triangle[hit]], where[hit]))
        begin = stop
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3))
    pixel, triangle, where = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((triangle, where[:, 0], pixel))
    pixel, triangle, where = pixel[order], triangle[order], where[order]
    new = np.ones(len(pixel), bool)
    new[1:] = pixel[1:] != pixel[:-1]
    return pixel[new], triangle[new], where[new]


def _cut(first: np.ndarray, second: np.ndarray, third: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of rays from 0 and triangles, [M, 3] each: (whether they meet ahead, length and shares of two corners [M, 3]).

    Source: Möller and Trumbore, "Fast, Minimum Storage Ray/Triangle Intersection", 1997.
    """
    across = _cross(rays, third)
    whole = (second * across).sum(axis=1)
    flat = np.abs(whole) < 1e-300
    whole = np.where(flat, 1.0, whole)
    one = -(first * across).sum(axis=1) / whole
    beside = _cross(-first, second)
    two, length = (rays * beside).sum(axis=1) / whole, (third * beside).sum(axis=1) / whole
    hit = ~flat & (one >= -1e-9) & (two >= -1e-9) & (one + two <= 1 + 1e-9) & (length > 1e-6)
    return hit, np.stack([length, one, two], axis=1)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """np.cross of [M, 3], in a third of its time."""
    (ax, ay, az), (bx, by, bz) = a.T, b.T
    return np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], axis=1)


@dataclass(frozen=True)
class Sensor:
    """What a scanner gets wrong; by default nothing.

    Args:
        depth: standard deviation of depth at 1 metre, in metres, which grows with its square; >= 0.
        missing: share of the pixels that have no depth, in patches, in [0, 1].
        shift: largest change of each channel of all pictures of a room, and of its contrast, as shares of white; >= 0.
        grain: standard deviation of the noise on colours, >= 0.
        tilt: standard deviation of each coordinate of normals, >= 0.
    Raises: UserError for settings outside of these.
    """

    depth: float = 0.0
    missing: float = 0.0
    shift: float = 0.0
    grain: float = 0.0
    tilt: float = 0.0

    def __post_init__(self) -> None:
        require_in("[0, 1]", missing=self.missing)
        require_in("[0, inf)", depth=self.depth, shift=self.shift, grain=self.grain, tilt=self.tilt)

    def scanned(self, frames: PosedFrames, seed: int, number: int) -> PosedFrames:
        """PosedFrames as this scanner has them; depth is 0 where it is missing."""
        draws = Draws(seed, np.array([number]), 43)
        V, _, H, W = frames.pictures.shape
        depth = frames.depth + np.float32(self.depth) * frames.depth**2 * draws.normal(V, H, W)[0]
        # Patches of about an eighth of a picture: the least of a smooth field.
        coarse = draws.normal(V, 9, 9)[0]
        rows, columns = np.linspace(0, 8, H), np.linspace(0, 8, W)
        r, c = rows.astype(int).clip(max=7), columns.astype(int).clip(max=7)
        down, over = (rows - r)[:, None], (columns - c)[None]
        smooth = (1 - down) * (1 - over) * coarse[:, r][:, :, c] + down * (1 - over) * coarse[:, r + 1][:, :, c]
        smooth = smooth + (1 - down) * over * coarse[:, r][:, :, c + 1] + down * over * coarse[:, r + 1][:, :, c + 1]
        rank = smooth.reshape(-1).argsort(kind="stable").argsort(kind="stable").reshape(smooth.shape)
        depth = np.where(rank < round(self.missing * smooth.size), np.float32(0), np.maximum(depth, np.float32(1e-3)))
        gain, bias = 1 + self.shift * draws.between(-1, 1, 3)[0], self.shift * draws.between(-1, 1, 3)[0]
        grain = self.grain * draws.normal(*frames.pictures.shape)[0]
        pictures = frames.pictures * gain[:, None, None] + bias[:, None, None] + grain
        normal = frames.normal + self.tilt * draws.normal(*frames.normal.shape)[0]
        normal = normal / np.linalg.norm(normal, axis=1, keepdims=True).clip(1e-6)
        return frames._replace(
            pictures=np.clip(pictures, 0, 1).astype(np.float32),
            depth=depth.astype(np.float32),
            normal=normal.astype(np.float32),
        )


CLEAN, NOISY = Sensor(), Sensor(depth=0.01, missing=0.2, shift=0.15, grain=0.03, tilt=0.2)
