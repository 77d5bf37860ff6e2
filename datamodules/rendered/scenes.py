"""Scenes of several objects with exact labels: what lies where, in which order, of which shape, colour and texture.

A scene is a function of (seed, index). First its objects are laid out, then they are painted in a style: the same
layout in two styles has the same labels to the last bit.
Shapes: B scenes, K places for objects, H W picture, G tags.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.augment.rendering import LUMA, blurred
from lightspan.datamodules.rendered.draws import Draws
from lightspan.datamodules.rendered.outlines import REACH, cover
from lightspan.datamodules.rendered.textures import PALETTE, TEXTURES, hue_turned, woven

SHAPES = ("disc", "ring", "half disc", "square", "triangle", "cross", "bar", "flower")
COLOURS = tuple(PALETTE)
SIZES = {"small": (0.11, 0.15), "large": (0.2, 0.27)}  # radius as a share of the shorter side, least and most
TAGS = (*SHAPES, *COLOURS, *TEXTURES, *SIZES)
NEAREST, FARTHEST = 1.0, 10.0  # depths of objects are between these; the ground's is the second
GROUND_LIGHT = 0.35  # the ground is darker than this, and any object's colour has a brighter channel
WORDS = {"plain": "plain", "stripes": "striped", "checks": "checked", "dots": "dotted"}  # of textures, in captions
SEEN = 0.15  # an object counts as seen if this share of its pixels is, and at least one
AT_ONCE = 32  # scenes whose numbers fit into a processor's cache


class SceneLayout(NamedTuple):
    """Objects of B scenes from the nearest to the farthest; places beyond a scene's last object hold -1, or 0.

    shape, colour, texture, size: int64 [B, K], places in `SHAPES`, `COLOURS`, `TEXTURES`, `SIZES`.
    centre: float32 [B, K, 2], x and y in pixels; the first pixel's middle is at 0.
    radius: float32 [B, K], in pixels.
    angle: float32 [B, K], in radians in [0, 2 pi).
    depth: float32 [B, K], in (1, 10), ascending.
    """

    shape: np.ndarray
    colour: np.ndarray
    texture: np.ndarray
    size: np.ndarray
    centre: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    depth: np.ndarray


@dataclass(frozen=True)
class Style:
    """How a layout is painted. No label depends on it.

    Args:
        hue: turns of the colour circle.
        texture: strength of all textures, those of the ground included, in [0, 1].
        shade: how dark objects become towards the right of their own frame, in [0, 1]: with it, the angle of each shape
            can be seen, also that of a disc.
        grain: standard deviation of the noise on each channel, where white is 1.
        blur: standard deviation of a Gaussian, in pixels.
        grey: whether the three channels are equal.
        inverted: whether dark and bright are swapped.
    """

    hue: float = 0.0
    texture: float = 1.0
    shade: float = 0.0
    grain: float = 0.03
    blur: float = 0.0
    grey: bool = False
    inverted: bool = False

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (self.hue, self.grain, self.blur)))
        if not 0 <= self.texture <= 1 or not 0 <= self.shade <= 1 or min(self.grain, self.blur) < 0 or not finite:
            raise UserError(
                f"style: texture={self.texture} and shade={self.shade} must be in [0, 1], and grain={self.grain} and "
                f"blur={self.blur} at least 0, and like hue={self.hue} finite"
            )


class DrawnScenes(NamedTuple):
    """What B scenes look like, and what follows from their layout pixel by pixel.

    images: uint8 [B, 3, H, W].
    instances: int64 [B, H, W], 0 for the ground, else 1 + the place of the object that can be seen there: of those that
        cover at least half of the pixel, the nearest.
    visible: float32 [B, K], the share of an object's pixels in the picture that no nearer one hides; 0 if it has none.
    hides: int64 [B, K, K], 1 where object i lies in front of a pixel of object j.
    """

    images: np.ndarray
    instances: np.ndarray
    visible: np.ndarray
    hides: np.ndarray


@dataclass(frozen=True)
class SceneSpace:
    """All scenes that may be drawn.

    Args:
        height, width: of the picture in pixels, at least 1.
        fewest, most: objects, 0 <= fewest <= most and 1 <= most.
        shapes: how many of `SHAPES` are used, from the first.
        colours: how many of `COLOURS`.
        zipf: exponent >= 0 of a long tail: the k-th shape, colour, texture and size come in proportion to k^-zipf; with
            0 all are equally frequent.
    """

    height: int = 48
    width: int = 48
    fewest: int = 1
    most: int = 4
    shapes: int = len(SHAPES)
    colours: int = len(COLOURS)
    zipf: float = 0.0

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1 or not 0 <= self.fewest <= self.most or self.most < 1:
            raise UserError(
                f"scenes of height={self.height} and width={self.width} pixels with fewest={self.fewest} to "
                f"most={self.most} objects: sides and most must be at least 1, and fewest in [0, most]"
            )
        numbers = 128 * self.most * max(self.most, 3 * self.height * self.width)  # of the pictures that are measured
        require_numbers(numbers, height=self.height, width=self.width, most=self.most)
        if not 1 <= self.shapes <= len(SHAPES) or not 1 <= self.colours <= len(COLOURS):
            raise UserError(
                f"scenes have 1 to {len(SHAPES)} shapes and 1 to {len(COLOURS)} colours, not shapes={self.shapes} and "
                f"colours={self.colours}"
            )
        if not 0 <= self.zipf < math.inf:
            raise UserError(
                f"zipf={self.zipf} of scenes is the exponent of a long tail; it must be at least 0 and finite"
            )

    def layout(self, seed: int, index: np.ndarray) -> SceneLayout:
        """The objects of the scenes with these numbers, int64 [B]."""
        draws, K = Draws(seed, index), self.most
        absent = np.arange(K) >= self.fewest + draws.integers(self.most - self.fewest + 1)[:, None]
        kinds = [self._kinds(draws, n) for n in (self.shapes, self.colours, len(TEXTURES), len(SIZES))]
        x, y, angle, wide, near = np.moveaxis(draws.uniform(K, 5), 2, 0)
        side = min(self.height, self.width)
        least, most = np.array([*SIZES.values()], dtype=np.float32)[kinds[3]].transpose(2, 0, 1) * side
        radius = least + wide * (most - least)
        # Half of an object may stick out, so that outlines at borders are seen too.
        half = np.float32(0.5)
        centre = np.stack(
            [
                half * radius + share * np.maximum(length - radius, 0) - half
                for share, length in ((x, self.width), (y, self.height))
            ],
            axis=2,
        )
        depth = np.sort(np.where(absent, 2, near), axis=1)
        numbers = (radius, np.float32(2 * np.pi) * angle, NEAREST + np.float32(FARTHEST - NEAREST) * depth)
        shape, colour, texture, size = (np.where(absent, -1, kind) for kind in kinds)
        return SceneLayout(
            shape,
            colour,
            texture,
            size,
            np.where(absent[:, :, None], np.float32(0), centre),
            *(np.where(absent, np.float32(0), number) for number in numbers),
        )

    def _kinds(self, draws: Draws, count: int) -> np.ndarray:
        """Which of `count` kinds each place for an object has, int64 [B, K]."""
        if not self.zipf:
            return draws.integers(count, self.most)
        share = np.arange(1, count + 1) ** -self.zipf
        ends = np.cumsum(share / share.sum())[:-1].astype(np.float32)
        return np.searchsorted(ends, draws.uniform(self.most), side="right")

    def draw(
        self, layout: SceneLayout, seed: int, index: np.ndarray, style: Style, hues: np.ndarray | None = None
    ) -> DrawnScenes:
        """Paints scenes. `seed` and `index` are those of the layout: shades, phases and grain come from them.

        Args:
            hues: turns of the colour circle for the objects of each scene, beside the style's, float32 [B].
        """
        hues = np.zeros(len(index), dtype=np.float32) if hues is None else hues
        parts = [slice(start, start + AT_ONCE) for start in range(0, max(len(index), 1), AT_ONCE)]
        drawn = [
            self._draw(SceneLayout(*(field[part] for field in layout)), seed, index[part], style, hues[part])
            for part in parts
        ]
        return DrawnScenes(*(np.concatenate(field) for field in zip(*drawn, strict=True)))

    def _draw(self, layout: SceneLayout, seed: int, index: np.ndarray, style: Style, hues: np.ndarray) -> DrawnScenes:
        draws, (B, K) = Draws(seed, index, 1), layout.shape.shape
        image = _ground(draws, self.height, self.width, style).swapaxes(0, 1).reshape(3, -1)
        paints = np.array([*PALETTE.values()], dtype=np.float32)[layout.colour] + draws.between(-0.08, 0.08, K, 3)
        paints = hue_turned(np.clip(paints, 0, 1), np.float32(style.hue) + hues[:, None]) * draws.between(
            0.75, 1.0, K, 1
        )

        # Only pixels near an object are looked at: those of the farthest objects of all scenes, then those of the next.
        # What belongs to one of the K B objects is repeated for each of its pixels.
        far = SceneLayout(*(field[:, ::-1].swapaxes(0, 1).reshape(K * B, *field.shape[2:]) for field in layout))
        x, y = (
            np.arange(n, dtype=np.float32) - far.centre[:, i, None] for i, n in enumerate((self.width, self.height))
        )
        reach = np.where(far.shape < 0, np.float32(0), REACH * far.radius + 1)  # one more pixel for the smooth edge
        near = (x**2)[:, None] + (y**2)[..., None] < (reach**2)[:, None, None]
        pixels = np.count_nonzero(near, axis=(1, 2))
        number, area = np.repeat(np.arange(K * B), pixels), self.height * self.width
        pixel = np.flatnonzero(near) - number * area
        down, across = np.divmod(pixel.astype(np.int32), np.int32(self.width))
        radius = np.maximum(far.radius, np.float32(1e-9))
        cos, sin = np.cos(far.angle) / radius, np.sin(far.angle) / radius
        cos, sin, cx, cy = (np.repeat(value, pixels) for value in (cos, sin, far.centre[:, 0], far.centre[:, 1]))
        dx, dy = across.astype(np.float32) - cx, down.astype(np.float32) - cy
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        inside = cover(np.repeat(far.shape, pixels), SHAPES, u, v, np.repeat(radius, pixels))
        # A texture repeats every 0.8 radii, so that it is as clear on small objects as on large ones.
        phases = draws.between(0, 2 * np.pi, K, 2)[:, ::-1].swapaxes(0, 1).reshape(K * B, 2)
        a, b = (np.sin(np.float32(2 * np.pi / 0.8) * w + np.repeat(phases[:, i], pixels)) for i, w in enumerate((u, v)))
        light = 1 - np.float32(0.75 * style.texture) * (1 - woven(np.repeat(far.texture, pixels), a, b))
        light *= 1 - np.float32(style.shade / 2) * np.clip(u + 1, 0, 2)
        paints = paints[:, ::-1].swapaxes(0, 1).reshape(K * B, 3)
        paint = [np.repeat(channel, pixels) * light for channel in paints.T]

        place = number % B * area + pixel  # in the chunk
        instances, own = np.zeros(B * area, dtype=np.int64), np.zeros((K, B * area), dtype=bool)
        ends = np.cumsum([0, *pixels.reshape(K, B).sum(axis=1)])
        for k, start, end in zip(range(K)[::-1], ends, ends[1:], strict=False):
            at = place[start:end]
            for plane, colour in zip(image, paint, strict=True):
                below = plane[at]
                plane[at] = below + inside[start:end] * (colour[start:end] - below)
            there = at[inside[start:end] >= 0.5]
            instances[there], own[k, there] = k + 1, True
        own = own.reshape(K, B, area)
        instances = instances.reshape(B, self.height, self.width)
        shown = np.bincount((np.arange(B)[:, None, None] * (K + 1) + instances).ravel(), minlength=B * (K + 1))
        visible = shown.reshape(B, K + 1)[:, 1:] / np.maximum(own.sum(axis=2).T, 1)
        hides = np.zeros((B, K, K), dtype=np.int64)
        for i in range(K):
            for j in range(i + 1, K):
                hides[:, i, j] = (own[i] & own[j]).any(axis=1)
        picture = np.ascontiguousarray(image.reshape(3, B, self.height, self.width).swapaxes(0, 1))
        return DrawnScenes(finished(picture, draws, style), instances, visible.astype(np.float32), hides)


def _ground(draws: Draws, height: int, width: int, style: Style) -> np.ndarray:
    """Dark soft waves between two colours, float32 [B, 3, H, W]."""
    first, second = np.moveaxis(hue_turned(draws.between(0, GROUND_LIGHT, 2, 3), style.hue), 1, 0)
    angle, phase, length = np.moveaxis(draws.uniform(3), 1, 0)[..., None, None]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    turn = np.float32(2 * np.pi)
    # Three to nine waves across the picture.
    frequency = turn * (3 + 6 * length) / max(height, width)
    wave = np.sin(frequency * (np.cos(turn * angle) * x + np.sin(turn * angle) * y) + turn * phase)
    share = np.float32(0.5) + np.float32(0.5 * style.texture) * wave
    return first[:, :, None, None] + share[:, None] * (second - first)[:, :, None, None]


def finished(image: np.ndarray, draws: Draws, style: Style) -> np.ndarray:
    """Bytes [B, 3, H, W] of painted pictures, float32 in [0, 1], which are used up: greyed, blurred, inverted, grained.

    Grain comes last: cameras add it. It is the same on all channels of grey pictures.
    """
    if style.grey:
        image[:] = sum(np.float32(share) * image[:, i : i + 1] for i, share in enumerate(LUMA))
    if style.blur:
        image = blurred(torch.from_numpy(image), style.blur, style.blur).numpy()
    if style.inverted:
        image = 1 - image
    if style.grain:
        image += np.float32(style.grain) * draws.normal(1 if style.grey else 3, *image.shape[2:])
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def depths(layout: SceneLayout, instances: np.ndarray) -> np.ndarray:
    """The depth of each pixel, float32 [B, H, W]: of the object that can be seen there, 10 for the ground."""
    ground = np.full((len(instances), 1), FARTHEST, dtype=np.float32)
    return by_object(np.concatenate([ground, layout.depth], axis=1), instances)


def semantics(layout: SceneLayout, instances: np.ndarray) -> np.ndarray:
    """The class of each pixel, int64 [B, H, W]: 0 for the ground, else 1 + the object's shape."""
    return by_object(np.pad(layout.shape + 1, ((0, 0), (1, 0))), instances)


def by_object(table: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """What a table [B, 1 + K] says of the ground and the objects, in their pixels [B, H, W]."""
    return np.take_along_axis(table, instances.reshape(len(instances), -1), axis=1).reshape(instances.shape)


def seen(layout: SceneLayout, drawn: DrawnScenes) -> np.ndarray:
    """Which objects can be seen, bool [B, K]: at least one pixel, and `SEEN` of those that nearer ones might hide."""
    return (layout.shape >= 0) & (drawn.visible >= SEEN)


def tags(layout: SceneLayout, shown: np.ndarray) -> np.ndarray:
    """Which of `TAGS` hold of any object that can be seen, int64 [B, G] of 0 and 1. `shown` is `seen`."""
    found, start = np.zeros((len(shown), len(TAGS) + 1), dtype=np.int64), 0
    rows = np.arange(len(shown))[:, None]
    for kind, names in (
        (layout.shape, SHAPES),
        (layout.colour, COLOURS),
        (layout.texture, TEXTURES),
        (layout.size, SIZES),
    ):
        found[rows, np.where(shown, start + kind, len(TAGS))] = 1  # the last column takes what is not there
        start += len(names)
    return found[:, :-1]


def captions(layout: SceneLayout, drawn: DrawnScenes, shown: np.ndarray) -> list[str]:
    """A sentence for each scene that names all objects that can be seen, from the nearest to the farthest, and how the
    first lies to the second: "a large red striped disc in front of a small blue plain bar, with a small red plain bar".

    In front of: it hides a part of the other. Else left of, right of, above or below, whichever differs more.
    """
    sentences = []
    for row, there in enumerate(shown):
        which = np.flatnonzero(there).tolist()
        things = [
            f"a {[*SIZES][layout.size[row, k]]} {COLOURS[layout.colour[row, k]]} "
            f"{WORDS[TEXTURES[layout.texture[row, k]]]} {SHAPES[layout.shape[row, k]]}"
            for k in which
        ]
        if len(which) > 1:
            first, second = which[:2]
            right, down = (layout.centre[row, first] - layout.centre[row, second]).tolist()
            if drawn.hides[row, first, second]:
                relation = "in front of"
            elif abs(right) >= abs(down):
                relation = "right of" if right > 0 else "left of"
            else:
                relation = "below" if down > 0 else "above"
            things[:2] = [f"{things[0]} {relation} {things[1]}"]
        sentences.append(", with ".join(things) or "nothing")
    return sentences
