"""Handwritten digits that move: clips whose motion is known, from real pictures.

Source: after Moving MNIST (Srivastava et al., 2015, arXiv 1502.04681). Differences: one digit, of scikit-learn's, moves
straight on and enters again at the opposite side, so that its direction is the same throughout.
Shapes: C = 1 channel, T frames, H W pixels, K starts, S speeds.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.augment.fields import ImageFields
from lightspan.datamodules.image.augment.views import Views
from lightspan.datamodules.image.sets.small import Digits, Labelled
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets
from lightspan.datamodules.video.batch import ClipBatch, ClipsBatch
from lightspan.datamodules.video.clips import ClipFields, ClipTimes, require_clips, single

DIRECTIONS = 8
FPS = 25.0
SIDE = 16
"""Of a digit: twice its 8 pixels."""
LATER = 64
"""At most so many frames after the first clip of a video begins another one."""


class MovingDigits(SampleSets):
    """1,437 digits for training and 360 for validation, grey, on black, in 25 frames a second: batches of `ClipBatch`,
    or in training of `ClipsBatch` for several clips of a digit.

    Start, speed and, where digits are the labels, direction are functions of a training sample's seed, new in each
    epoch, and in evaluation of its number. All clips of a sample show one movement.

    Args:
        frames: T, at least 1.
        size: height and width in pixels, at least 16.
        label: what the label is: one of eight directions, which no single frame shows, or the digit.
        speed: least and most, in pixels per frame.
        clips, speeds, views: as in `lightspan.datamodules.video.folder.VideoFolder`.
        batch_size: clips of one optimiser step over all ranks.
        seed: of the order and of the clips.
        num_workers: processes that make batches.
        selection: as in `lightspan.datamodules.loading.sample_sets.SampleSets`.
    """

    bounds: tuple[torch.Tensor, torch.Tensor]

    def __init__(
        self,
        frames: int = 8,
        size: int = 32,
        label: Literal["direction", "digit"] = "direction",
        speed: tuple[float, float] = (1.0, 3.0),
        clips: int = 1,
        speeds: tuple[float, ...] = (1.0,),
        views: Views | None = None,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        selection: ReadPath | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, selection)
        require_in(f"[{SIDE}, inf)", size=size)
        if not 0 <= speed[0] <= speed[1] < math.inf:
            raise UserError(f"speed={list(speed)} must be the least and the most, at least 0")
        self.times = ClipTimes(frames, FPS, clips, tuple(speeds))
        require_clips(self.times, size, views)
        self.size, self.label, self.speed, self.views = size, label, speed, views

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
        standard = torch.full((1, 1, 1), mean), torch.full((1, 1, 1), std)
        settings = (self.size, self.label, self.speed)
        fields = ClipFields(ImageFields(*standard, self.views), len(self.times.speeds))
        self.train = MovingSamples(training, *settings, self.times, fields)
        middle = replace(self.times, clips=1, speeds=self.times.speeds[:1])
        self.bank, self.val = (
            MovingSamples(digits, *settings, middle, ClipFields(ImageFields(*standard)), fixed=True)
            for digits in (training, test)
        )
        self.bounds = tuple(torch.full((1, 1, 1), (x - mean) / std) for x in (0, 1))  # type: ignore[assignment]
        say(f"videos: {len(self.train)} moving digits for training and {len(self.val)} for validation")


@dataclass(frozen=True)
class MovingSamples:
    """The clips of some digits.

    Args:
        times: which frames the clips have.
        fields: makes the clips.
        fixed: by a sample's number alone.
        digits, size, label, speed: as in `MovingDigits`.
    """

    digits: Labelled
    size: int
    label: Literal["direction", "digit"]
    speed: tuple[float, float]
    times: ClipTimes
    fields: ClipFields
    fixed: bool = False

    @property
    def batch_type(self) -> type:
        return ClipsBatch if self.times.count > 1 else ClipBatch

    def __len__(self) -> int:
        return len(self.digits.labels)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        draws = np.random.default_rng([index, 0] if self.fixed else [seed, 1])
        direction = index % DIRECTIONS if self.label == "direction" else int(draws.integers(DIRECTIONS))
        start_2, speed = draws.uniform(0, self.size, 2), draws.uniform(*self.speed)
        angle = 2 * math.pi * direction / DIRECTIONS
        step_2 = speed * np.array([math.sin(angle), math.cos(angle)])  # row, column
        numbers_KST = self._numbers(draws)
        places = np.rint(start_2 + numbers_KST[..., None] * step_2).astype(int).reshape(-1, 2)
        picture = self._picture(index)
        frames = torch.from_numpy(np.stack([np.roll(picture, place, (0, 1)) for place in places.tolist()]))
        starts = frames[:, None].unflatten(0, numbers_KST.shape)
        made = self.fields(list(starts), draws.integers(2**63, size=self.times.clips).tolist())
        rates = [FPS / times for times in self.times.speeds] * self.times.clips
        return single(
            {
                **made,
                "fps": torch.tensor(rates),
                "frames": torch.from_numpy(numbers_KST).flatten(0, 1),
                "label": direction if self.label == "direction" else int(self.digits.labels[index]),
                "index": index,
            }
        )

    def _numbers(self, draws: np.random.Generator) -> np.ndarray:
        """The frames of the clips, int64 [K S T], of a video that goes on until the last clip ends."""
        firsts = [0, *draws.integers(LATER + 1, size=self.times.clips - 1).tolist()]
        video = self.times.steady(LATER)
        return np.stack([self.times.numbers(video, 0, len(video), first) for first in firsts])

    def _picture(self, index: int) -> np.ndarray:
        """The digit in a corner, uint8 [H W]."""
        picture = np.zeros((self.size, self.size), np.uint8)
        digit = self.digits.images[index].reshape(SIDE // 2, SIDE // 2)
        picture[:SIDE, :SIDE] = digit.repeat(2, 0).repeat(2, 1)
        return picture
