"""Data of the comparison: which pictures train, choose and test, and the batches that all methods get alike.

Shapes: N pictures, C channels, S side in pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightspan.datamodules.image.augment.views import MultiCrop, NestedCrops, RandomViews, Views
from lightspan.datamodules.image.folder import ImageFolder
from lightspan.datamodules.image.sets.small import FashionMNIST, ImageSamples, Labelled, channel_moments

DRAWINGS = Path("/usr/share/openclipart/png")
TRAINING, DRAWING_SIDE = 2500, 32
PARTS = ("train", "val", "test")
PROBED = 5000
"""Training pictures that probes read, at most."""
SEED_STRIDE = 1_000_003
Batch = dict[str, object]


@dataclass(frozen=True, eq=False)
class Split:
    """Pictures, uint8, and labels; `val` chooses the rate, and is None for data that take the rates of others."""

    train: Labelled
    val: Labelled | None
    test: Labelled
    mean: Tensor
    std: Tensor

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def side(self) -> int:
        return self.train.images.shape[-1]

    @property
    def classes(self) -> int:
        return 1 + int(max(self.train.labels.max(), self.test.labels.max()))

    @cached_property
    def images(self) -> dict[str, Tensor]:
        """The pictures of each part as they are, standardised, [N C S S]; of those to train the first `PROBED`."""
        parts = {part: self.samples(data) for part in PARTS if (data := getattr(self, part)) is not None}
        counts = {
            part: len(samples) if part != "train" else min(len(samples), PROBED) for part, samples in parts.items()
        }
        return {
            part: torch.stack([samples.sample(row, 0)["image"] for row in range(counts[part])])
            for part, samples in parts.items()
        }

    def samples(self, data: Labelled, views: Views | None = None) -> ImageSamples:
        return ImageSamples(data, self.mean, self.std, views)


def _fashion(source: str, val_size: int) -> Split:
    data = FashionMNIST(source=source, val_size=val_size)  # type: ignore[arg-type]
    data.setup()
    assert data.train is not None
    train, val, test = (samples.data for samples in (data.train, data.val, data.test))
    return Split(train, val, test, data.train.mean, data.train.std)  # type: ignore[arg-type]


def drawings(folder: Path = DRAWINGS, train: int = TRAINING, side: int = DRAWING_SIDE) -> Split:
    """Drawings whose class is their folder: about 1,000 held out by their names test, and `train` of the others train,
    the same in every run.
    """
    data = ImageFolder(str(folder), size=side, skip_damaged=True, val_share=0.145)
    data.setup()
    assert data.train is not None
    kept = np.sort(np.random.default_rng(0).permutation(len(data.train))[:train])
    sides = []
    for samples, numbers in ((data.train, kept), (data.val, range(len(data.val)))):
        pixels, labels = zip(*(samples.data.read(int(number)) for number in numbers), strict=True)
        sides.append(Labelled(np.stack(pixels), np.array(labels, dtype=np.int64)))
    return Split(sides[0], None, sides[1], *channel_moments(sides[0].images))


@cache
def load(name: str) -> Split:
    """fashion: the shipped extract, 2,500 pictures to train, 500 to choose by and 1,000 to test; full: the whole set,
    50,000, 10,000 and 10,000; openclipart: see `drawings`.
    """
    return {
        "fashion": lambda: _fashion("shipped", 500),
        "full": lambda: _fashion("full", 10_000),
        "openclipart": drawings,
    }[name]()


def views_of(kind: str, split: Split) -> Views:
    """Random views, which methods share by kind; colours change where there are any, hue excepted, which takes four
    times as long as all other steps.
    """
    colour = {"saturation": 0.4, "grey": 0.2} if split.channels == 3 else {}
    plain = {"brightness": 0.0, "contrast": 0.0}
    if kind == "two":
        return RandomViews(count=2, **colour)
    if kind == "crops":
        small = RandomViews(count=4, size=split.side // 2, scale=(0.1, 0.4), **colour)
        return MultiCrop([RandomViews(count=2, **colour), small])
    if kind == "one":
        return RandomViews(count=1, scale=(0.5, 1.0), **plain)
    assert kind == "nested", kind
    return NestedCrops(RandomViews(count=1, **plain), RandomViews(count=1, scale=(0.3, 0.6), **plain))


def batches(split: Split, kind: str, seed: int, steps: int, size: int) -> list[Batch]:
    """The batches of a run: in each pass over the pictures a new order and new views; a rest below `size` is left
    out.
    """
    samples, order = split.samples(split.train, views_of(kind, split)), np.random.default_rng(seed)
    rows: list[int] = []
    made = []
    for step in range(steps):
        if len(rows) < size:
            rows = order.permutation(len(samples)).tolist()
        taken, rows = rows[:size], rows[size:]
        first = seed * SEED_STRIDE + step * size
        made.append(default_collate([samples.sample(row, first + at) for at, row in enumerate(taken)]))
    return made


class Passes:
    """Batches of a run as a loader, which gives the next pass over the pictures each time it is asked for one."""

    def __init__(self, made: list[Batch], images: int) -> None:
        self.made, self.length, self.begun = made, images // len(made[0]["label"]), 0  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        # A generator: Lightning also asks for iterators of which it takes nothing, and these must not count.
        start = self.begun * self.length
        self.begun += 1
        assert start < len(self.made), "Lightning would wait for ever for a step"
        yield from self.made[start : start + self.length]
