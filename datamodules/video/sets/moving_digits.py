"""Handwritten digits that move: clips whose motion is known, from real pictures.

Source: after Moving MNIST (Srivastava et al., 2015, arXiv 1502.04681). Differences: one digit, of scikit-learn's, moves
straight on and enters again at the opposite side, so that its direction is the same throughout.
Shapes: C = 1 channel, T frames, H W pixels.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.sets.small import Digits, Labelled
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets
from lightspan.datamodules.video.batch import ClipBatch

DIRECTIONS = 8
SIDE = 16
"""Of a digit: twice its 8 pixels."""


class MovingDigits(SampleSets):
    """1,437 digits for training and 360 for validation, grey, on black: batches of `ClipBatch` of 25 frames a second.

    Start, speed and, where digits are the labels, direction are functions of a training sample's seed, new in each
    epoch, and in evaluation of its number.

    Args:
        frames: T, at least 1.
        size: height and width in pixels, at least 16.
        label: what the label is: one of eight directions, which no single frame shows, or the digit.
        speed: least and most, in pixels per frame.
        batch_size: clips of one optimiser step over all ranks.
        seed: of the order and of the clips.
        num_workers: processes that make batches.
    """

    bounds: tuple[torch.Tensor, torch.Tensor]

    def __init__(
        self,
        frames: int = 8,
        size: int = 32,
        label: Literal["direction", "digit"] = "direction",
        speed: tuple[float, float] = (1.0, 3.0),
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        require_in("[1, inf)", frames=frames)
        require_in(f"[{SIDE}, inf)", size=size)
        if not 0 <= speed[0] <= speed[1] < math.inf:
            raise UserError(f"speed={list(speed)} must be the least and the most, at least 0")
        self.frames, self.size, self.label, self.speed = frames, size, label, speed

    @property
    def num_classes(self) -> int:
        return DIRECTIONS if self.label == "direction" else Digits.num_classes

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        training, test = Digits().load()
        grey = training.images.astype(np.float64) / 255
        covered = SIDE**2 / self.size**2
        mean = float(grey.mean()) * covered
        std = math.sqrt(float(np.square(grey).mean()) * covered - mean**2)
        settings = (self.frames, self.size, self.label, self.speed, mean, std)
        self.train, self.bank = MovingSamples(training, *settings), MovingSamples(training, *settings, fixed=True)
        self.val = MovingSamples(test, *settings, fixed=True)
        self.bounds = tuple(torch.full((1, 1, 1), (x - mean) / std) for x in (0, 1))  # type: ignore[assignment]
        say(f"videos: {len(self.train)} moving digits for training and {len(self.val)} for validation")


@dataclass(frozen=True)
class MovingSamples:
    """The clips of some digits. fixed: by a sample's number alone. Others as in `MovingDigits`."""

    digits: Labelled
    frames: int
    size: int
    label: Literal["direction", "digit"]
    speed: tuple[float, float]
    mean: float
    std: float
    fixed: bool = False
    batch_type = ClipBatch

    def __len__(self) -> int:
        return len(self.digits.labels)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        draws = np.random.default_rng([index, 0] if self.fixed else [seed, 1])
        direction = index % DIRECTIONS if self.label == "direction" else int(draws.integers(DIRECTIONS))
        start_2, speed = draws.uniform(0, self.size, 2), draws.uniform(*self.speed)
        angle = 2 * math.pi * direction / DIRECTIONS
        step_2 = speed * np.array([math.sin(angle), math.cos(angle)])  # row, column
        picture = np.zeros((self.size, self.size), np.float32)
        digit = self.digits.images[index].reshape(SIDE // 2, SIDE // 2)
        picture[:SIDE, :SIDE] = digit.repeat(2, 0).repeat(2, 1) / np.float32(255)
        places = np.rint(start_2 + np.arange(self.frames)[:, None] * step_2).astype(int)
        clip_THW = np.stack([np.roll(picture, place, (0, 1)) for place in places.tolist()])
        return {
            "clip": (torch.from_numpy(clip_THW)[None] - self.mean) / self.std,
            "fps": torch.tensor(25.0),
            "frames": torch.arange(self.frames),
            "label": direction if self.label == "direction" else int(self.digits.labels[index]),
            "index": index,
        }
