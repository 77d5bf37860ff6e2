"""Figures of persons who wear a code of colours, seen by several cameras in tracklets: who is who is known exactly.

A person's number is turned into a code one to one, so that two persons never look alike, and sets whose numbers differ
share nobody.
Shapes: B pictures, V pictures of a person, H W picture in pixels, C channels.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.augment.fields import ImageFields, Place
from lightspan.datamodules.image.augment.views import Views
from lightspan.datamodules.image.batch import ViewsBatch
from lightspan.datamodules.image.sets.small import class_groups
from lightspan.datamodules.loading.order import GroupSizes, Order
from lightspan.datamodules.rendered.batch import PersonBatch
from lightspan.datamodules.rendered.data import PARTS, ChannelMoments, RenderedSamples, RenderedSets, require_pictures
from lightspan.datamodules.rendered.draws import Draws
from lightspan.datamodules.rendered.scenes import Style, finished
from lightspan.datamodules.rendered.textures import PALETTE

HAIR = ((0.1, 0.08, 0.06), (0.45, 0.28, 0.12), (0.85, 0.7, 0.35), (0.6, 0.6, 0.62))
CLOTHES = tuple(PALETTE.values())
STRIPES = 3  # of the shirt
CODES = len(HAIR) * len(CLOTHES) ** (STRIPES + 1)  # hair, stripes, trousers: 16,384 persons
TURN, OFFSET = 6_365, 1_009  # odd, and CODES is a power of two: number -> code is one to one
SKIN = (0.85, 0.66, 0.52)
AT_ONCE = 32  # pictures whose numbers fit into a processor's cache


class Sighting(NamedTuple):
    """Who is where in B pictures, int64 [B] each.

    label: the person whom the picture's tracklet is said to show.
    identity: the person whom the picture shows.
    tracklet: its number among all.
    camera: in [0, cameras).
    frame: its place in the tracklet.
    """

    label: np.ndarray
    identity: np.ndarray
    tracklet: np.ndarray
    camera: np.ndarray
    frame: np.ndarray


@dataclass(frozen=True)
class Crowd:
    """A set of persons and how they are seen.

    Args:
        first, count: their numbers, consecutive ones.
        tracklets: of a person. The cameras take turns.
        frames: pictures of a tracklet.
        cameras: how many there are.
        wrong: share of the tracklets that show another person of the set than their label says, in [0, 1].
        mixed: share of the pictures that show another person than the rest of their tracklet, in [0, 1].
        height, width: of a picture in pixels.
    """

    first: int
    count: int
    tracklets: int
    frames: int
    cameras: int
    wrong: float
    mixed: float
    height: int
    width: int

    def __len__(self) -> int:
        return self.count * self.tracklets * self.frames

    def sightings(self, seed: int, index: np.ndarray) -> Sighting:
        """Of the pictures at these places of the set, int64 [B]. In a set of one person nobody can be confused."""
        tracklet, frame = np.divmod(index, self.frames)
        label, turn = np.divmod(tracklet, self.tracklets)
        tracklet = tracklet + self.first * self.tracklets
        identity = label
        for draws, share in (
            (Draws(seed, tracklet, 4), self.wrong),
            (Draws(seed, tracklet, 5, frame), self.mixed),
        ):
            confused = draws.uniform() < np.float32(share)
            other = (identity + 1 + draws.integers(max(self.count - 1, 1))) % self.count
            identity = np.where(confused, other, identity)
        return Sighting(label, self.first + identity, tracklet, turn % self.cameras, frame)

    def pictures(self, seed: int, seen: Sighting) -> np.ndarray:
        """uint8 [B, 3, H, W]."""
        parts = [slice(at, at + AT_ONCE) for at in range(0, max(len(seen.label), 1), AT_ONCE)]
        drawn = [_drawn(seed, Sighting(*(field[part] for field in seen)), self.height, self.width) for part in parts]
        return np.concatenate(drawn)


def codes(identity: np.ndarray) -> np.ndarray:
    """Places of hair in `HAIR`, of three stripes and the trousers in `CLOTHES`: int64 [B, 5], another for each person.

    Args:
        identity: int64 [B], each in [0, CODES).
    """
    code, sizes = (identity * TURN + OFFSET) % CODES, (len(HAIR), *[len(CLOTHES)] * (STRIPES + 1))
    return np.stack(np.unravel_index(code, sizes), axis=1)


def _drawn(seed: int, seen: Sighting, height: int, width: int) -> np.ndarray:
    B = len(seen.label)
    camera, walk = Draws(seed, seen.camera, 6), Draws(seed, seen.tracklet, 7)
    own = Draws(seed, seen.tracklet, 8, seen.frame)
    y, x = (np.float32(2) * axis.astype(np.float32) / height for axis in np.mgrid[:height, :width])  # 2 high
    ground, light, tint = camera.between(0.15, 0.75, 2, 3), camera.between(0.65, 1.0), camera.between(0.85, 1.15, 3)
    waves, slope = camera.between(4, 14), camera.between(-1, 1)
    wave = np.sin(waves[:, None, None] * (y + slope[:, None, None] * x) + walk.between(0, 6.3)[:, None, None])
    share = (np.float32(0.5) + np.float32(0.5) * wave)[:, None]
    first, second = ground[:, 0, :, None, None], ground[:, 1, :, None, None]
    image = first + share * (second - first)

    middle = np.float32(width / height) + walk.between(-0.12, 0.12) + own.between(-0.05, 0.05)
    size = walk.between(0.82, 1.0)
    top = np.float32(2) - np.float32(1.95) * size + own.between(-0.04, 0.02)
    stride = np.sin(walk.between(0, 6.3) + np.float32(0.8) * seen.frame.astype(np.float32))
    u = (x - middle[:, None, None]) / size[:, None, None]
    v = (y - top[:, None, None]) / size[:, None, None]

    hair, *stripes, trousers = codes(seen.identity).T
    clothes = np.array(CLOTHES, np.float32)
    pixel = np.float32(2 / height)

    def paint(distance: np.ndarray, colour: np.ndarray) -> None:
        """Lays a colour [B, 3] over where a distance [B, H, W] is above 0."""
        inside = np.clip(np.float32(0.5) + distance / pixel, 0, 1)[:, None]
        image[:] += inside * (colour[:, :, None, None] - image)

    for side in (-1, 1):  # a leg swings about the hip
        lean = np.float32(side * 0.22) * stride[:, None, None] * np.maximum(v - np.float32(1.0), 0)
        away = np.abs(u - np.float32(side * 0.1) - lean)
        high = np.abs(v - np.float32(1.42))
        paint(np.minimum(np.float32(0.085) - away, np.float32(0.42) - high), clothes[trousers])
    skin = np.broadcast_to(np.array(SKIN, np.float32), (B, 3))
    for side in (-1, 1):  # an arm swings against the leg on its side
        lean = np.float32(-side * 0.2) * stride[:, None, None] * np.maximum(v - np.float32(0.45), 0)
        away = np.abs(u - np.float32(side * 0.3) - lean)
        paint(np.minimum(np.float32(0.055) - away, np.float32(0.3) - np.abs(v - np.float32(0.72))), skin)
    shoulders = np.float32(0.24) - np.abs(u)
    for number, stripe in enumerate(stripes):
        paint(np.minimum(shoulders, np.float32(0.105) - np.abs(v - np.float32(0.52 + 0.2 * number))), clothes[stripe])
    head = np.float32(0.17) - np.sqrt(u**2 + (v - np.float32(0.23)) ** 2)
    paint(head, skin)
    paint(np.minimum(head + np.float32(0.02), np.float32(0.17) - v), np.array(HAIR, np.float32)[hair])
    image = np.clip(image * (light[:, None] * tint)[:, :, None, None], 0, 1)
    return finished(image, own, Style(grain=0.03))


class PersonSamples(RenderedSamples):
    """Samples of `PersonBatch`; with `fields` their views, or what they are made of, in place of the image."""

    def __init__(
        self, crowd: Crowd, draw_seed: int, moments: ChannelMoments, fields: ImageFields | None = None
    ) -> None:
        super().__init__(0, len(crowd))
        self.crowd, self.draw_seed, self.moments, self.fields = crowd, draw_seed, moments, fields

    @property
    def batch_type(self) -> type:
        return PersonBatch if self.fields is None else self.fields.batch_type

    def draw(self, numbers: np.ndarray, seeds: np.ndarray) -> dict[str, Any]:
        seen = self.crowd.sightings(self.draw_seed, numbers)
        pictures, make = self.crowd.pictures(self.draw_seed, seen), self.fields
        if make is None:
            made: dict[str, Any] = {"image": self.moments.standardised(pictures)}
        else:
            pairs = zip(torch.from_numpy(pictures), seeds.tolist(), strict=True)
            made = default_collate([make(picture, seed) for picture, seed in pairs])
        return {**made, **{name: torch.from_numpy(field) for name, field in seen._asdict().items()}}


class PersonGroups(RenderedSamples):
    """Samples of `ViewsBatch`: for each label as many of its pictures as asked for, drawn anew in each epoch.

    Pictures of a label are drawn with replacement if there are fewer.
    """

    batch_type = ViewsBatch

    def __init__(self, crowd: Crowd, pictures: int, draw_seed: int, moments: ChannelMoments) -> None:
        super().__init__(0, crowd.count)
        self.crowd, self.pictures, self.draw_seed, self.moments = crowd, pictures, draw_seed, moments

    def draw(self, numbers: np.ndarray, seeds: np.ndarray) -> dict[str, Any]:
        each = self.crowd.tracklets * self.crowd.frames
        keys = Draws(self.draw_seed, numbers, 9, seeds).uniform(max(each, self.pictures))
        # The places of the smallest numbers: distinct pictures, as long as there are enough.
        chosen = keys.argsort(axis=1)[:, : self.pictures] % each
        views, parameters = [], []
        for place in chosen.T:
            seen = self.crowd.sightings(self.draw_seed, numbers * each + place)
            views.append(self.moments.standardised(self.crowd.pictures(self.draw_seed, seen)))
            parameters.append(np.stack([seen.identity, seen.tracklet, seen.camera, seen.frame], axis=1))
        known = torch.from_numpy(np.stack(parameters, axis=1)).float()
        return {"views": views, "parameters": known, "label": torch.from_numpy(numbers)}


class Persons(RenderedSets):
    """Persons in tracklets of several cameras. Training batches are `PersonBatch`, or with `together` `ViewsBatch` of
    as many pictures of each label, whose `parameters` are identity, tracklet, camera and frame; all others are
    `PersonBatch`. With `views` training pictures have views of their own in place of the image.

    Labels are confused in training alone. `size`, `val_size` and `test_size` count persons; together there are at most
    16,384. A training person is a function of its place counted from the front, a test or validation person of its
    place counted from the back.

    Args:
        tracklets: of a person, at least 1; the cameras take turns.
        frames: pictures of a tracklet, at least 1.
        cameras: at least 1.
        together: pictures of one label that stand in one row of a training batch; None trains on single pictures.
        wrong, mixed: shares of confused tracklets and pictures, as in `Crowd`.
        height, width: of a picture in pixels.
        views: makes the views of a training picture; not with `together`.
        views_on: "workers" or "device", as in `lightspan.datamodules.image.sets.small.ImageData`.
        groups: training pictures of one label that stand side by side, by epoch, see
            `lightspan.datamodules.loading.order.ClassGroups`; None mixes all. Not with `together`.
        settings: those of `RenderedSets`.
    """

    def __init__(
        self,
        tracklets: int = 4,
        frames: int = 8,
        cameras: int = 2,
        together: int | None = None,
        wrong: float = 0.0,
        mixed: float = 0.0,
        height: int = 48,
        width: int = 24,
        views: Views | None = None,
        views_on: Place = "workers",
        groups: GroupSizes | None = None,
        size: int = 400,
        val_size: int = 50,
        test_size: int = 50,
        **settings: Any,
    ) -> None:
        super().__init__(size, val_size, test_size, **settings)
        if min(tracklets, frames, cameras, height, width, 1 if together is None else together) < 1:
            raise UserError(
                f"persons with tracklets={tracklets} of frames={frames} by cameras={cameras}, height={height}, "
                f"width={width} and together={together}: each must be at least 1"
            )
        if not 0 <= wrong <= 1 or not 0 <= mixed <= 1:
            raise UserError(f"wrong={wrong} and mixed={mixed} are shares of tracklets and pictures, in [0, 1]")
        if together is not None and (views is not None or groups is not None):
            raise UserError(
                f"together={together} puts pictures of a label into one row, and views and groups are of single "
                "pictures; leave together out, or both of them"
            )
        if size + val_size + test_size > CODES:
            raise UserError(
                f"size={size}, val_size={val_size} and test_size={test_size} ask for more than the {CODES} persons "
                "that can be told apart; lower one of them"
            )
        require_pictures(3 * (together or 1) * height * width, together=together, height=height, width=width)
        people = size + val_size + test_size
        require_numbers(people * tracklets * frames, tracklets=tracklets, frames=frames)
        self.together, self.wrong, self.mixed = together, wrong, mixed
        self.views, self.views_on, self.groups = views, views_on, groups
        self.shape = tracklets, frames, cameras
        self.height, self.width, self.num_classes = height, width, size

    def crowd(self, part: str) -> Crowd:
        """The persons of training, validation or test."""
        firsts = {"training": 0, "validation": CODES - self.test_size - self.val_size, "test": CODES - self.test_size}
        count = {"training": self.size, "validation": self.val_size, "test": self.test_size}[part]
        noise = (self.wrong, self.mixed) if part == "training" else (0.0, 0.0)
        return Crowd(firsts[part], count, *self.shape, *noise, self.height, self.width)

    def pictures(self, numbers: np.ndarray) -> np.ndarray:
        crowd = self.crowd("training")
        return crowd.pictures(self.draw_seed, crowd.sightings(self.draw_seed, numbers * (len(crowd) // len(numbers))))

    def samples(self, first: int, count: int, moments: ChannelMoments) -> PersonSamples:
        part = next(name for name, start in PARTS.items() if start == first)
        return PersonSamples(self.crowd(part), self.draw_seed, moments)

    def setup(self, stage: str | None = None) -> None:
        """As `RenderedSets.setup`; training pictures then have their views, or others of their label beside them."""
        if self.train is not None:
            return
        super().setup(stage)
        crowd, moments = self.crowd("training"), self.bank.moments  # type: ignore[attr-defined]
        if self.together is not None:
            self.train = PersonGroups(crowd, self.together, self.draw_seed, moments)
        elif self.views is not None:
            fields = ImageFields(moments.mean, moments.std, self.views, self.views_on)
            fields.attach(self)
            self.train = PersonSamples(crowd, self.draw_seed, moments, fields)

    def training_order(self) -> Order | None:
        if self.groups is None:
            return None
        crowd = self.crowd("training")
        labels = np.arange(len(crowd)) // (crowd.tracklets * crowd.frames)
        return class_groups(labels, self, self.groups)
