"""Heads that turn under a light of nine coefficients a colour: clips whose faces, shading and light are known exactly.

A head is a few ellipsoids, seen along parallel rays: where a ray meets one has a closed form, and so has the normal
there. Colours of skin, hair, eyes and lips belong to the head and turn with it. What is seen is colour times shading
(`lightspan.datamodules.rendered.harmonic_light`), before a ground that no light falls on; a clip's shading is the same
head in white.
Shapes: B heads, T frames, K ellipsoids, H W pixels, P = H*W of them. Axes: x to the right, y up, z to the camera.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from lightspan.core.ranges import require_in
from lightspan.datamodules.rendered.data import ChannelMoments, RenderedSamples, RenderedSets, require_pictures
from lightspan.datamodules.rendered.draws import Draws
from lightspan.datamodules.rendered.harmonic_light import COEFFICIENTS, CONSTANT, shading
from lightspan.datamodules.video.batch import LitClipBatch

FPS = 25.0
REACH = 1.25
"""Half the height of a picture, where a head is about 2 high."""
EYE, LIPS, NECK = 0.13, (0.26, 0.09), -0.55
"""The radius of an eye, half the sides of lips, and how high a head's hair reaches down at most."""
WAVES = 2  # of colour over the skin
BRIGHT = (0.5, 0.8)
"""Least and greatest mean of the shading over all directions."""


class Heads(NamedTuple):
    """Heads as they face the camera, float32.

    centre, radii: [B, K, 3]: skull, jaw, nose and two ears.
    skin, hair, eyes, lips: colours [B, 3].
    wave: [B, WAVES, 4]: direction and phase of what varies the skin. tint: [B, WAVES, 3]: how much.
    hairline: [B]: hair is above it in front.
    eye_at, lips_at: [B, 2], x > 0 and y of an eye, and height and width of the lips.
    """

    centre: np.ndarray
    radii: np.ndarray
    skin: np.ndarray
    hair: np.ndarray
    eyes: np.ndarray
    lips: np.ndarray
    wave: np.ndarray
    tint: np.ndarray
    hairline: np.ndarray
    eye_at: np.ndarray
    lips_at: np.ndarray


class SeenHeads(NamedTuple):
    """What a camera sees of heads, float32.

    colour: [B, T, 3, H, W], of the surface, 0 beside it. normal: [B, T, 3, H, W], 0 beside it. face: bool [B, T, H, W].
    """

    colour: np.ndarray
    normal: np.ndarray
    face: np.ndarray


def heads_of(draws: Draws) -> Heads:
    """Of so many people."""
    wide, high, deep = draws.between(0.6, 0.78), draws.between(0.85, 1.0), draws.between(0.72, 0.88)
    jaw_wide, jaw_low = draws.between(0.42, 0.6), draws.between(0.4, 0.6)
    nose_long, nose_wide, nose_deep = draws.between(0.16, 0.26), draws.between(0.09, 0.16), draws.between(0.16, 0.3)
    ear = draws.between(0.12, 0.22)
    zero = np.zeros_like(wide)
    centre = [
        (zero, zero + np.float32(0.05), zero),
        (zero, -jaw_low, zero + np.float32(0.2)),
        (zero, zero - np.float32(0.1), deep),
        (-wide, zero, zero - np.float32(0.05)),
        (wide, zero, zero - np.float32(0.05)),
    ]
    radii = [
        (wide, high, deep),
        (jaw_wide, zero + np.float32(0.5), zero + np.float32(0.5)),
        (nose_wide, nose_long, nose_deep),
        (zero + np.float32(0.08), ear, ear * np.float32(0.7)),
        (zero + np.float32(0.08), ear, ear * np.float32(0.7)),
    ]
    tone = draws.between(0.35, 0.95)[:, None] * np.array([1.0, 0.8, 0.66], np.float32)
    hair_tone = draws.between(0.08, 0.75)[:, None] * draws.between(0.6, 1.0, 3)
    skin = np.clip(tone * draws.between(0.9, 1.1, 3), 0, 1)
    lips = np.clip(skin * np.array([1.05, 0.6, 0.6], np.float32), 0, 1)
    places, halves = (np.stack([np.stack(part, axis=1) for part in parts], axis=1) for parts in (centre, radii))
    return Heads(
        places,
        halves,
        skin,
        hair_tone,
        draws.between(0.02, 0.5, 3),
        lips,
        draws.between(-5, 5, WAVES, 4),
        draws.between(-0.12, 0.12, WAVES, 3),
        draws.between(0.25, 0.6),
        np.stack([draws.between(0.22, 0.32), draws.between(0.1, 0.22)], axis=1),
        np.stack([draws.between(-0.52, -0.42), draws.between(0.7, 1.3)], axis=1),
    )


def lights_of(draws: Draws) -> np.ndarray:
    """Coefficients float32 [B, 9, 3] of lights that come mostly from one side of the camera's half of the world."""
    bright = draws.between(*BRIGHT)
    tint = draws.between(0.8, 1.0, 3)
    angle, up = draws.between(-2.2, 2.2), draws.between(-0.9, 0.9)
    towards = np.stack([np.sin(angle) * np.cos(up), np.sin(up), np.cos(angle) * np.cos(up)], axis=1)
    strength = draws.between(0.4, 0.75)
    light = np.zeros((len(bright), COEFFICIENTS, 3), np.float32)
    light[:, 0] = bright[:, None]
    # Y_1 is sqrt(3) Y_0 times a coordinate, and a matt surface keeps 2/3: the shading is bright (1 + strength w n).
    light[:, 1:4] = (bright * strength * np.float32(1.5 / np.sqrt(3)))[:, None, None] * towards[:, :, None]
    light[:, 4:] = bright[:, None, None] * draws.between(-0.15, 0.15, 5)[:, :, None]
    return light * tint[:, None] / np.float32(CONSTANT)


def turned(yaw: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """Rotations float32 [..., 3, 3] of a head that turns to the right by yaw, then up by pitch, in radians."""
    (a, b), (c, d) = (np.cos(yaw), np.sin(yaw)), (np.cos(pitch), np.sin(pitch))
    zero = np.zeros_like(a)
    rows = [[a, zero, b], [-b * d, c, a * d], [-b * c, -d, a * c]]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2).astype(np.float32)


def seen(heads: Heads, rotation: np.ndarray, size: int) -> SeenHeads:
    """Heads [B] as they are turned, float32 [B, T, 3, 3], on `size` x `size` pixels."""
    B, T = rotation.shape[:2]
    middle = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2 * REACH / size) - np.float32(REACH)
    x, y = (axis.reshape(-1) for axis in np.meshgrid(middle, -middle))
    # In the axes of the head: a ray through (x, y, 0) that goes away from the camera. R^T v, written out: a matrix
    # product's rounding depends on the batch.
    across, up, ahead = (rotation[:, :, row, :, None] for row in range(3))
    start, way = across * x + up * y, -np.broadcast_to(ahead, (B, T, 3, x.size))
    length = np.full((B, T, x.size), np.inf, np.float32)
    point, normal = np.zeros((2, B, T, 3, x.size), np.float32)
    for k in range(heads.centre.shape[1]):
        centre, radii = (part[:, None, k, :, None] for part in (heads.centre, heads.radii))
        p, q = (start - centre) / radii, way / radii
        a, b, c = (_sum(one * other) for one, other in ((q, q), (p, q), (p, p)))
        under = b * b - a * (c - 1)
        near = np.where(under > 0, (-b - np.sqrt(np.maximum(under, 0))) / a, np.inf).astype(np.float32)
        first = near < length
        length = np.where(first, near, length)
        at = start + np.where(first, near, 0)[:, :, None] * way
        own = (at - centre) / radii**2
        own = own / np.sqrt(np.maximum(_sum(own * own), np.float32(1e-12)))[:, :, None]
        point, normal = np.where(first[:, :, None], at, point), np.where(first[:, :, None], own, normal)
    face = np.isfinite(length)
    colour = np.where(face[:, :, None], _coloured(heads, point), 0)
    towards = sum(rotation[:, :, :, i, None] * normal[:, :, None, i] for i in range(3))
    sides = (B, T, 3, size, size)
    return SeenHeads(
        np.float32(colour).reshape(sides), np.float32(towards).reshape(sides), face.reshape(B, T, size, size)
    )


def _sum(vectors: np.ndarray) -> np.ndarray:
    """Over the axis of x, y, z, written out."""
    return vectors[:, :, 0] + vectors[:, :, 1] + vectors[:, :, 2]


def _coloured(heads: Heads, point: np.ndarray) -> np.ndarray:
    """The colour of points of the surface, both [B, T, 3, P]."""
    x, y, z = point[:, :, 0], point[:, :, 1], point[:, :, 2]

    def of(number: np.ndarray) -> np.ndarray:
        return number[:, None, None]

    colour = np.broadcast_to(heads.skin[:, None, :, None], point.shape)
    for k in range(WAVES):
        a, b, c, phase = (of(heads.wave[:, k, i]) for i in range(4))
        colour = colour + np.sin(a * x + b * y + c * z + phase)[:, :, None] * heads.tint[:, None, k, :, None]
    eye = (np.abs(x) - of(heads.eye_at[:, 0])) ** 2 + (y - of(heads.eye_at[:, 1])) ** 2 < EYE**2
    lips = (x / of(LIPS[0] * heads.lips_at[:, 1])) ** 2 + ((y - of(heads.lips_at[:, 0])) / LIPS[1]) ** 2 < 1
    # Hair is above a plane that falls to the back of the head.
    hair = (y > of(heads.hairline) + np.minimum(z - np.float32(0.4), 0) * 2) & (y > NECK)
    front = z > 0.2
    for there, own in ((eye & front, heads.eyes), (lips & front, heads.lips), (hair, heads.hair)):
        colour = np.where(there[:, :, None], own[:, None, :, None], colour)
    return np.clip(colour, 0, 1)


class HeadSpace(NamedTuple):
    """All clips that may be drawn.

    Args:
        size: sides in pixels. frames: T. turn: degrees that a head is turned by at most. fixed_light: whether all clips
            and references have the one light that comes evenly from all around.
    """

    size: int
    frames: int
    turn: float
    fixed_light: bool

    def clips(self, seed: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Pictures in [0, 1] and what belongs to them: `clip` [B, T, 3, H, W], `shading` alike, `face` [B, T, H, W],
        `light` [B, 9, 3], `colour` and `normal` as the clip, and `reference`, `reference_face`, `reference_light`, of
        one frame.
        """
        heads = heads_of(Draws(seed, numbers, 30))
        draws = Draws(seed, numbers, 31)
        most = np.float32(np.deg2rad(self.turn))
        # From one pose to another, and a third for the reference.
        yaw, pitch = most * draws.between(-1, 1, 3), most * np.float32(0.5) * draws.between(-1, 1, 3)
        share = np.linspace(0, 1, self.frames, dtype=np.float32)
        yaw, pitch = (
            np.concatenate([one[:, :1] + (one[:, 1:2] - one[:, :1]) * share, one[:, 2:]], axis=1)
            for one in (yaw, pitch)
        )
        found = seen(heads, turned(yaw, pitch), self.size)
        lights = [lights_of(Draws(seed, numbers, 32 + part)) for part in range(2)]
        if self.fixed_light:
            lights = [np.zeros_like(light) for light in lights]
            for light in lights:
                light[:, 0] = np.float32(0.7 / CONSTANT)
        light = np.stack([lights[0]] * self.frames + [lights[1]], axis=1)
        normal = torch.from_numpy(found.normal.transpose(0, 1, 3, 4, 2))
        shaded = shading(torch.from_numpy(light)[:, :, None, None], normal).numpy().transpose(0, 1, 4, 2, 3)
        inside = found.face[:, :, None]
        shaded = np.where(inside, np.clip(shaded, 0, None), 0)
        ground = draws.between(0.1, 0.7, 2, 3)[:, :, :, None]
        down = np.linspace(0, 1, self.size, dtype=np.float32)
        behind = (ground[:, 0] + (ground[:, 1] - ground[:, 0]) * down)[:, None, :, :, None]
        picture = np.where(inside, np.clip(found.colour * shaded, 0, 1), behind)
        own = (picture, shaded, found.face, found.colour, found.normal)
        clip, shown, face, colour, towards = (field[:, :-1] for field in own)
        return {
            "clip": clip,
            "shading": shown,
            "face": face,
            "colour": colour,
            "normal": towards,
            "light": lights[0],
            "reference": picture[:, -1],
            "reference_face": found.face[:, -1],
            "reference_light": lights[1],
        }


class HeadSamples(RenderedSamples):
    """Samples of `LitClipBatch`."""

    batch_type = LitClipBatch

    def __init__(self, first: int, count: int, space: HeadSpace, draw_seed: int, moments: ChannelMoments) -> None:
        super().__init__(first, count)
        self.space, self.draw_seed, self.moments = space, draw_seed, moments

    def draw(self, numbers: np.ndarray, seeds: np.ndarray) -> dict[str, Any]:
        drawn = self.space.clips(self.draw_seed, numbers)
        clip, reference = (self.moments.standardised(bytes_of(drawn[name])) for name in ("clip", "reference"))
        fields = {
            "face": drawn["face"].astype(np.int64),
            "reference_face": drawn["reference_face"].astype(np.int64),
            "shading": drawn["shading"].transpose(0, 2, 1, 3, 4),
            "light": drawn["light"],
            "label": numbers - self.first,
        }
        return {
            "clip": clip.transpose(1, 2).contiguous(),
            "fps": torch.full((len(numbers),), FPS),
            "reference": reference,
            "portrait": reference,
            **{name: torch.from_numpy(np.ascontiguousarray(field)) for name, field in fields.items()},
        }


def bytes_of(picture: np.ndarray) -> np.ndarray:
    """uint8 of [0, 1]."""
    return np.rint(picture * 255).astype(np.uint8)


class LitHeads(RenderedSets):
    """Clips of heads that turn under one light, each with a picture of the same head in another pose under another
    light: batches of `LitClipBatch`, in pixels. No head is in two sets.

    Args:
        image_size: height and width in pixels, at least 8.
        frames: T, at least 1.
        turn: degrees that a head is turned to a side at most, and half as many up or down; in [0, 60].
        fixed_light: every clip and picture has the same light, evenly from all around; as if nobody knew of light.
        size, val_size, test_size: heads of the sets.
        batch_size: clips of one optimiser step over all ranks.
        settings: those of `RenderedSets`.
    """

    def __init__(
        self,
        image_size: int = 16,
        frames: int = 6,
        turn: float = 35.0,
        fixed_light: bool = False,
        size: int = 2048,
        val_size: int = 64,
        test_size: int = 64,
        batch_size: int = 16,
        **settings: Any,
    ) -> None:
        super().__init__(size, val_size, test_size, batch_size, **settings)
        require_in("[8, inf)", image_size=image_size)
        require_in("[1, inf)", frames=frames)
        require_in("[0, 60]", turn=turn)
        require_pictures(60 * (frames + 1) * image_size**2, image_size=image_size, frames=frames)
        self.space = HeadSpace(image_size, frames, turn, fixed_light)
        self.num_classes = size

    def pictures(self, numbers: np.ndarray) -> np.ndarray:
        return bytes_of(self.space.clips(self.draw_seed, numbers)["reference"])

    def samples(self, first: int, count: int, moments: ChannelMoments) -> HeadSamples:
        return HeadSamples(first, count, self.space, self.draw_seed, moments)

    def described(self) -> str:
        return f"{self.space.frames} frames of {self.space.size} x {self.space.size} pixels"
