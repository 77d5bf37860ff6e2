"""Drawn scenes with exact captions: "a large red triangle left of a small blue circle". Nothing is read.

Shapes: N scenes, S pixels a side.
"""

import math
from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.sets.shapes import SIDE
from lightspan.datamodules.image_text.captioned import Captioned, CaptionedImages
from lightspan.datamodules.rendered.outlines import cover, frames

SIZES = {"small": (2.8, 3.4), "large": (5.2, 6.2)}  # radius in pixels, least and most
COLOURS = {
    "red": (0.95, 0.15, 0.15),
    "green": (0.15, 0.8, 0.2),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (0.95, 0.9, 0.15),
    "purple": (0.65, 0.2, 0.85),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = {"circle": "disc", "ring": "ring", "square": "square", "triangle": "triangle", "cross": "cross", "bar": "bar"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # x and y of the first object
THINGS = tuple(f"{size} {colour} {shape}" for size in SIZES for colour in COLOURS for shape in SHAPES)
AT_ONCE = 256  # scenes whose numbers fit into a processor's cache
TEMPLATES = ("a {}", "there is a {}", "a picture of a {}", "a photo of a {}")


def factors(labels: np.ndarray) -> np.ndarray:
    """Size, colour and shape of each thing, int64 [N, 3]."""
    return np.stack(np.unravel_index(labels, (len(SIZES), len(COLOURS), len(SHAPES))), axis=1)


def unseen_things(share: float) -> np.ndarray:
    """The things that are held out, int64, sorted: every size, colour and shape is left among the others."""
    size, colour, shape = factors(np.arange(len(THINGS))).T
    # Along diagonals, so that what is held out is spread evenly over sizes, colours and shapes.
    turn = (colour + shape + 3 * size) % len(SHAPES)
    return np.sort(np.lexsort((colour, size, turn))[: round(share * len(THINGS))])


def draw(
    first: np.ndarray,
    second: np.ndarray,
    noise: float,
    ground: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[np.ndarray, list[str]]:
    """(uint8 [N, 3, S, S], N captions): things, places, angles, shades, the ground, the grain and the words vary.

    Args:
        first, second: int64 [N], each in [0, 72), see `THINGS`; -1 in `second` for scenes of one thing.
        noise: standard deviation of each channel's grain, where white is 1.
        ground: least and most of each channel of the ground, in [0, 1].
    """
    count = len(first)
    kind = generator.integers(len(RELATIONS), size=count)
    side = np.array([*RELATIONS.values()])[kind]
    two = second >= 0
    shade = generator.uniform(*ground, (count, 3, 1, 1)).astype(np.float32)
    image = np.broadcast_to(shade, (count, 3, SIDE, SIDE)).copy()
    for thing, sign in ((second, -1), (first, 1)):
        size, colour, shape = factors(np.maximum(thing, 0)).T
        radius = generator.uniform(*np.array([*SIZES.values()])[size].T)
        free = generator.uniform(-1, 1, (count, 2)) * (SIDE / 2 - radius - 0.5)[:, None]
        # Beside each other, things lie a quarter of the picture from its middle, and wander across that line alone.
        beside = sign * side * SIDE / 4 + generator.uniform(-1, 1, (count, 2)) * np.where(side == 0, SIDE / 5, 0.7)
        centre = SIDE / 2 - 0.5 + np.where(two[:, None], beside, free)
        angle = generator.uniform(0, 2 * np.pi, count)
        inside = cover(shape, [*SHAPES.values()], *frames(centre, radius, angle, SIDE, SIDE), radius[:, None, None])
        inside[thing < 0] = 0
        paint = np.array([*COLOURS.values()])[colour] * generator.uniform(0.75, 1.0, (count, 1))
        image += inside[:, None].astype(np.float32) * (paint[:, :, None, None].astype(np.float32) - image)
    image += noise * generator.standard_normal(image.shape, dtype=np.float32)
    names = [
        f"{THINGS[a]} {[*RELATIONS][relation]} a {THINGS[b]}" if b >= 0 else THINGS[a]
        for a, b, relation in zip(first, second, kind, strict=True)
    ]
    words = generator.integers(len(TEMPLATES), size=count)
    captions = [TEMPLATES[word].format(name) for word, name in zip(words, names, strict=True)]
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8), captions


class Scenes(CaptionedImages):
    """Scenes of one or two things, 28 x 28 in colour: 2 sizes, 6 colours and 6 shapes are 72 things (`THINGS`).

    The label is the first thing. Validation and test scenes have one thing, as many of each; with `unseen` above 0 they
    are those that no training scene shows.

    Args:
        size: training scenes; a quarter as many are drawn for testing, from another stream.
        pairs: share of the training scenes with a second thing, in [0, 1].
        unseen: share of the things that no training scene shows, in [0, 0.5].
        noise, ground: as in `draw`; another ground or grain than a model was trained on is a shift of its domain.
        shuffled: captions belong to other scenes, drawn at random: a control, from which nothing can be learned.
        draw_seed: of the scenes. `seed` is that of their order.
        settings: those of `CaptionedImages`.
    """

    image_shape = (3, SIDE, SIDE)
    class_names = THINGS

    def __init__(
        self,
        size: int = 7200,
        pairs: float = 0.5,
        unseen: float = 0.0,
        noise: float = 0.03,
        ground: tuple[float, float] = (0.0, 0.35),
        shuffled: bool = False,
        draw_seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if size < 4 * len(THINGS) or noise < 0 or draw_seed < 0:
            raise UserError(
                f"size={size} must be at least {4 * len(THINGS)}, noise={noise} and draw_seed={draw_seed} at least 0"
            )
        if not 0 <= pairs <= 1 or not 0 <= unseen <= 0.5 or not 0 <= ground[0] <= ground[1] <= 1:
            raise UserError(
                f"pairs={pairs} must be in [0, 1], unseen={unseen} in [0, 0.5], and ground={list(ground)} two numbers "
                "with 0 <= least <= most <= 1"
            )
        require_numbers(size * math.prod(self.image_shape), size=size)
        self.size, self.pairs, self.unseen, self.noise = size, pairs, unseen, noise
        self.ground, self.shuffled, self.draw_seed = ground, shuffled, draw_seed

    def load(self) -> tuple[Captioned, Captioned]:
        unseen = unseen_things(self.unseen)
        seen = np.setdiff1d(np.arange(len(THINGS)), unseen)
        training = self._drawn(seen, self.size, self.pairs, stream=0)
        if self.shuffled:
            order = np.random.default_rng((self.draw_seed, 2)).permutation(self.size)
            training = training._replace(captions=[training.captions[i] for i in order])
        return training, self._drawn(unseen if len(unseen) else seen, self.size // 4, 0.0, stream=1)

    def _drawn(self, things: np.ndarray, count: int, pairs: float, stream: int) -> Captioned:
        generator = np.random.default_rng((self.draw_seed, stream))
        first = things[np.arange(count) % len(things)]
        second = np.where(generator.random(count) < pairs, generator.choice(things, count), -1)
        images, captions = [], []
        for start in range(0, count, AT_ONCE):
            part = slice(start, start + AT_ONCE)
            drawn, said = draw(first[part], second[part], self.noise, self.ground, generator)
            images.append(drawn)
            captions += said
        return Captioned(np.concatenate(images), captions, first.astype(np.int64))
