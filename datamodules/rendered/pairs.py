"""Two views of one scene of textured boxes in a room, with known cameras: depth, corresponding pixels, co-visibility.

Every ray is cut with every box in closed form, so depths and correspondences are exact to rounding.
Coordinates: x to the right, y down, z forward; lengths without a unit, the room is about 5 wide. A camera takes X to
R X + t. A pixel's middle lies at whole numbers.
Shapes: B scenes, V = 2 views, K boxes, K + 1 bodies with the room as the first, H W picture, N = H W rays of a view.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.rendered.batch import ScenePairBatch
from lightspan.datamodules.rendered.data import ChannelMoments, RenderedSamples, RenderedSets, require_pictures
from lightspan.datamodules.rendered.draws import Draws
from lightspan.datamodules.rendered.scenes import Style, finished

ROOM_CENTRE, ROOM_HALF = (0.0, 0.0, 0.6), (2.6, 1.9, 3.6)
TAN_HALF_VIEW = 3**-0.5  # of half the field of view of 60 degrees, across the picture
WAVES = 3  # of a texture
FACES = 6
AT_ONCE = 4  # scenes whose rays fit into a processor's cache
NEAR = 1e-3  # a point counts as visible if the ray to it ends within this share of its distance


class Boxes(NamedTuple):
    """Bodies of B scenes, the room first.

    centre, half: float32 [B, K + 1, 3], the middle and half of the sides; 0 sides for a box that is not there.
    cos, sin: float32 [B, K + 1], of the turn about the vertical axis.
    base: float32 [B, K + 1, 6, 3], the colour of each face.
    colour: float32 [B, K + 1, 6, 3, 3], what each of three waves adds to it.
    wave: float32 [B, K + 1, 6, 3, 3], of each wave its frequencies along both axes of the face, and its phase.
    """

    centre: np.ndarray
    half: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    base: np.ndarray
    colour: np.ndarray
    wave: np.ndarray


class Cameras(NamedTuple):
    """place: float32 [B, 3]; rotation: float32 [B, 3, 3], whose rows are the camera's axes. t is -R place."""

    place: np.ndarray
    rotation: np.ndarray


class DrawnPairs(NamedTuple):
    """What B pairs show.

    images: uint8 [B, V, 3, H, W].
    depth: float32 [B, V, H, W], along the camera's own axis.
    matches: float32 [B, V, H, W, 2], x and y of each pixel's point in the other view, also outside of it; -1 for points
        behind the other camera.
    covisible: bool [B, V, H, W], whether the other view shows that point.
    """

    images: np.ndarray
    depth: np.ndarray
    matches: np.ndarray
    covisible: np.ndarray


def boxes_of(seed: int, numbers: np.ndarray, fewest: int, most: int) -> Boxes:
    """The rooms with these numbers, int64 [B]."""
    draws, B = Draws(seed, numbers), len(numbers)
    there = np.arange(most) < fewest + draws.integers(most - fewest + 1)[:, None]
    least, end = np.array([[-1.6, -1.2, 0.3], [1.6, 1.2, 3.2]], np.float32)
    centre = least + (end - least) * draws.uniform(most, 3)
    half = np.where(there[..., None], draws.between(0.2, 0.55, most, 3), np.float32(0))
    turn = draws.between(0, np.pi, most + 1)
    turn[:, 0] = 0  # the room
    bodies = (B, most + 1, FACES)
    base = draws.between(0.3, 0.7, *bodies[1:], 3)
    colour = draws.between(-0.3, 0.3, *bodies[1:], WAVES, 3)
    wave = draws.between(-9, 9, *bodies[1:], WAVES, 3)  # of any phase, and up to one and a half turns for each length 1
    room = np.array([ROOM_CENTRE, ROOM_HALF], np.float32)[:, None, None].repeat(B, axis=1)
    return Boxes(
        np.concatenate([room[0], centre], axis=1),
        np.concatenate([room[1], half], axis=1),
        np.cos(turn),
        np.sin(turn),
        base,
        colour,
        wave,
    )


def cameras_of(seed: int, numbers: np.ndarray, motion: float) -> tuple[Cameras, Cameras]:
    """Two cameras a scene that look at nearly the same place; `motion` scales how the second differs from the first."""
    draws = Draws(seed, numbers, 1)
    place = np.array([0, 0, -1.7], np.float32) + np.array([0.8, 0.5, 0.2], np.float32) * draws.between(-1, 1, 3)
    target = np.array([0, 0, 2], np.float32) + np.array([0.5, 0.3, 0.5], np.float32) * draws.between(-1, 1, 3)
    moved = place + np.float32(motion) * np.array([0.7, 0.35, 0.35], np.float32) * draws.between(-1, 1, 3)
    aimed = target + np.float32(motion) * np.array([0.4, 0.3, 0.3], np.float32) * draws.between(-1, 1, 3)
    return _looking(place, target), _looking(moved, aimed)


def _looking(place: np.ndarray, target: np.ndarray) -> Cameras:
    ahead = _unit(target - place)
    right = _unit(np.stack([ahead[:, 2], np.zeros_like(ahead[:, 0]), -ahead[:, 0]], axis=1))  # down x ahead
    return Cameras(place, np.stack([right, np.cross(ahead, right), ahead], axis=1))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.sqrt((vectors**2).sum(axis=-1, keepdims=True))


def intrinsics(height: int, width: int) -> np.ndarray:
    """float32 [3, 3]: a field of view of 60 degrees across, the axis through the picture's middle."""
    focal = width / 2 / TAN_HALF_VIEW
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], np.float32)


def cast(boxes: Boxes, place: np.ndarray, ray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(length float32 [B, N], body int64 [B, N]): where rays first meet a body, as a multiple of the ray.

    The slabs of a box: its near side is where a ray has entered all three, its far side where it leaves the first. The
    room is seen from inside, so a ray always ends.

    Args:
        place: from where, [B, 3], inside the room and outside of all boxes.
        ray: float32 [B, 3, N].
    """
    length, body = np.empty(ray.shape[::2], dtype=np.float32), np.zeros(ray.shape[::2], dtype=np.int64)
    for k in range(boxes.centre.shape[1]):
        # 1e-20 stands for 0: a ray along a slab has always been in it, or never is.
        inverse = 1 / (_turned(boxes, k, ray) + np.float32(1e-20))
        middle, reach = -_local(boxes, k, place[:, :, None]) * inverse, boxes.half[:, k, :, None] * np.abs(inverse)
        leaves = middle + reach
        leaves = np.minimum(np.minimum(leaves[:, 0], leaves[:, 1]), leaves[:, 2])
        if k == 0:
            length = leaves
            continue
        enters = middle - reach
        enters = np.maximum(np.maximum(enters[:, 0], enters[:, 1]), enters[:, 2])
        hit = (enters < leaves) & (enters > 0) & (enters < length)
        length, body = np.where(hit, enters, length), np.where(hit, k, body)
    return length, body


def _turned(boxes: Boxes, k: int, vectors: np.ndarray) -> np.ndarray:
    """Vectors [B, 3, ...] as body k sees them."""
    cos, sin = boxes.cos[:, k, None], boxes.sin[:, k, None]
    x, y, z = vectors[:, 0], vectors[:, 1], vectors[:, 2]
    return np.stack([cos * x - sin * z, y, sin * x + cos * z], axis=1)


def _local(boxes: Boxes, k: int, points: np.ndarray) -> np.ndarray:
    """Points [B, 3, N] from the middle of body k, along its own axes."""
    return _turned(boxes, k, points - boxes.centre[:, k, :, None])


def _coloured(boxes: Boxes, points: np.ndarray, body: np.ndarray) -> np.ndarray:
    """The texture at points [B, 3, N] on the surfaces of these bodies, float32 [B, 3, N]."""
    rows = np.arange(len(points))[:, None] * boxes.centre.shape[1] + body
    cos, sin = boxes.cos.ravel()[rows], boxes.sin.ravel()[rows]
    x, y, z = (points - np.take(boxes.centre.reshape(-1, 3), rows, axis=0).transpose(0, 2, 1)).swapaxes(0, 1)
    local = np.stack([cos * x - sin * z, y, sin * x + cos * z])
    half = np.take(boxes.half.reshape(-1, 3), rows, axis=0).transpose(2, 0, 1)
    # The face is the one of whose plane the point is nearest, its side the sign.
    axis = (np.abs(local) - half).argmax(axis=0)
    across, along, through = (np.take_along_axis(local, ((axis + i) % 3)[None], axis=0)[0] for i in (1, 2, 0))
    face = rows * FACES + 2 * axis + (through > 0)
    base, colour, wave = (
        np.take(field.reshape(-1, *field.shape[3:]), face, axis=0) for field in (boxes.base, boxes.colour, boxes.wave)
    )
    swing = np.sin(across[..., None] * wave[..., 0] + along[..., None] * wave[..., 1] + wave[..., 2])  # [B, N, 3]
    painted = base
    for i in range(WAVES):
        painted = painted + swing[..., i, None] * colour[..., i, :]
    return painted.transpose(0, 2, 1)


def _transformed(rotation: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """R v for vectors [B, 3, N], written out: a matrix product's rounding depends on the batch."""
    return sum(rotation[:, :, i, None] * vectors[:, None, i] for i in range(3))


def draw_pairs(
    boxes: Boxes, cameras: tuple[Cameras, Cameras], height: int, width: int, draws: Draws, style: Style
) -> DrawnPairs:
    """Casts every ray of both views, and from every point that is met one more to the other camera."""
    B = len(boxes.centre)
    (fx, _, cx), (_, fy, cy), _ = intrinsics(height, width)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    own = np.stack([(x - cx) / fx, (y - cy) / fy, np.ones_like(x)]).reshape(1, 3, -1)
    images, depths, matches, covisible = [], [], [], []
    for camera, other in (cameras, cameras[::-1]):
        ray = _transformed(camera.rotation.swapaxes(1, 2), np.broadcast_to(own, (B, *own.shape[1:])))
        length, body = cast(boxes, camera.place, ray)  # the ray's own depth is 1
        points = camera.place[:, :, None] + length[:, None] * ray
        images.append(_coloured(boxes, points, body).reshape(B, 3, height, width))
        depths.append(length.reshape(B, height, width))
        back = points - other.place[:, :, None]
        there = _transformed(other.rotation, back)
        ahead = there[:, 2] > 1e-3
        z = np.where(ahead, there[:, 2], np.float32(1))
        u, v = fx * there[:, 0] / z + cx, fy * there[:, 1] / z + cy
        inside = ahead & (np.abs(u - cx) <= width / 2) & (np.abs(v - cy) <= height / 2)
        seen = inside & (cast(boxes, other.place, back)[0] > 1 - NEAR)
        pixel = np.where(ahead[..., None], np.stack([u, v], axis=-1), np.float32(-1))
        matches.append(pixel.reshape(B, height, width, 2))
        covisible.append(seen.reshape(B, height, width))
    bytes_of = [finished(np.ascontiguousarray(image), draws, style) for image in images]
    return DrawnPairs(*(np.stack(field, axis=1) for field in (bytes_of, depths, matches, covisible)))


def turns(rotation: np.ndarray) -> np.ndarray:
    """Rotations as vectors, axis times angle in radians: float32 [B, 3] of [B, 3, 3], for angles below half a turn.

    Of R - R^T the vector part has the length 2 sin(angle), and the trace is 1 + 2 cos(angle).
    """
    y, z, x = ((rotation[:, i, j] - rotation[:, j, i]) / 2 for i, j in ((0, 2), (1, 0), (2, 1)))
    sine = np.sqrt(x**2 + y**2 + z**2)
    cosine = (rotation[:, 0, 0] + rotation[:, 1, 1] + rotation[:, 2, 2] - 1) / 2
    # Where the angle is 0 to rounding it is its own sine.
    longer = np.where(sine > 1e-6, np.arctan2(sine, cosine) / np.maximum(sine, np.float32(1e-6)), np.float32(1))
    return longer[:, None] * np.stack([x, y, z], axis=1)


class PairSpace(NamedTuple):
    """All pairs that may be drawn: sides in pixels, boxes, how far apart the cameras are, and the style."""

    height: int
    width: int
    fewest: int
    most: int
    motion: float
    style: Style

    def pairs(self, seed: int, numbers: np.ndarray) -> tuple[Boxes, tuple[Cameras, Cameras], DrawnPairs]:
        """The pairs with these numbers."""
        boxes, cameras = boxes_of(seed, numbers, self.fewest, self.most), cameras_of(seed, numbers, self.motion)
        drawn = []
        for start in range(0, max(len(numbers), 1), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            some = Boxes(*(field[part] for field in boxes))
            both = Cameras(*(f[part] for f in cameras[0])), Cameras(*(f[part] for f in cameras[1]))
            draws = Draws(seed, numbers[part], 2)
            drawn.append(draw_pairs(some, both, self.height, self.width, draws, self.style))
        return boxes, cameras, DrawnPairs(*(np.concatenate(field) for field in zip(*drawn, strict=True)))


class ScenePairSamples(RenderedSamples):
    """Samples of `ScenePairBatch`."""

    batch_type = ScenePairBatch

    def __init__(self, first: int, count: int, space: PairSpace, draw_seed: int, moments: ChannelMoments) -> None:
        super().__init__(first, count)
        self.space, self.draw_seed, self.moments = space, draw_seed, moments

    def draw(self, numbers: np.ndarray, seeds: np.ndarray) -> dict[str, Any]:
        boxes, (one, two), drawn = self.space.pairs(self.draw_seed, numbers)
        # Of the first camera's coordinates: X2 = R2 R1^T X1 + R2 (place1 - place2).
        rotation = _transformed(two.rotation, one.rotation.swapaxes(1, 2))
        translation = _transformed(two.rotation, (one.place - two.place)[:, :, None])[..., 0]
        lens = np.repeat(intrinsics(self.space.height, self.space.width)[None], len(numbers), axis=0)
        fields = {
            "depth": drawn.depth,
            "matches": drawn.matches,
            "covisible": drawn.covisible.astype(np.int64),
            "rotation": rotation,
            "turn": turns(rotation),
            "translation": translation,
            "intrinsics": lens,
            "label": (boxes.half[:, 1:, 0] > 0).sum(axis=1) - self.space.fewest,
        }
        views = [self.moments.standardised(drawn.images[:, view]) for view in range(2)]
        return {"views": views, **{n: torch.from_numpy(np.ascontiguousarray(f)) for n, f in fields.items()}}


class ScenePairs(RenderedSets):
    """Pairs of views of one scene, for learning across views: batches of `ScenePairBatch`.

    Args:
        height, width: of a view in pixels, at least 1.
        fewest, most: boxes in a room, 0 <= fewest <= most and 1 <= most.
        motion: how far apart the two cameras are, in [0, 2]: at 0 they are the same; at 1 the mean view shows 83 % of
            what the other does, and each view of the first 64 pairs at least half.
        grain: standard deviation of the noise on each channel, where white is 1.
        settings: those of `RenderedSets`.
    """

    def __init__(
        self,
        height: int = 48,
        width: int = 48,
        fewest: int = 2,
        most: int = 5,
        motion: float = 1.0,
        grain: float = 0.02,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if min(height, width) < 1 or not 0 <= fewest <= most or most < 1 or not 0 <= motion <= 2:
            raise UserError(
                f"pairs of height={height} and width={width} pixels with fewest={fewest} to most={most} boxes and "
                f"motion={motion}: sides and most must be at least 1, fewest in [0, most], and motion in [0, 2]"
            )
        require_pictures(6 * most * height * width, height=height, width=width, most=most)
        self.space = PairSpace(height, width, fewest, most, motion, Style(grain=grain))
        self.num_classes = most - fewest + 1

    def pictures(self, numbers: np.ndarray) -> np.ndarray:
        return self.space.pairs(self.draw_seed, numbers)[2].images[:, 0]

    def samples(self, first: int, count: int, moments: ChannelMoments) -> ScenePairSamples:
        return ScenePairSamples(first, count, self.space, self.draw_seed, moments)
