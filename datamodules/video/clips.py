"""Clips of videos: which frames one has, a function of the sample and its seed, and the fields of a batch.

Shapes: V clips of a sample, S speeds, T frames of a clip, C H W frames.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.foreign import FRAMES
from lightspan.core.files.places import PathUse
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.augment.fields import DeviceViews, ImageFields
from lightspan.datamodules.image.augment.views import Views, numbers_of_views
from lightspan.datamodules.image.packed import Fit, fitted
from lightspan.datamodules.loading.damage import unreadable
from lightspan.datamodules.loading.on_device import finish_on_device
from lightspan.datamodules.video.batch import ClipBatch, ClipsBatch, DrawnClipsBatch
from lightspan.datamodules.video.reader import VideoIndex, read_frames


@dataclass(frozen=True)
class ClipTimes:
    """When the frames of a clip are shown: frame t of a clip that plays at speed s follows its first after t s / fps
    seconds, and is the frame of the video that is shown nearest to that time. So a variable frame rate needs no care.

    Args:
        frames: T of a clip, at least 1.
        fps: frames of a clip at speed 1 per second of the video; None takes each video's own rate.
        clips: starts that are drawn for each sample, independent of one another.
        speeds: of the clips of each start; all begin with the same frame. A start is drawn so that the fastest ends in
            time.
    """

    frames: int
    fps: float | None = None
    clips: int = 1
    speeds: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        if self.frames < 1 or self.clips < 1:
            raise UserError(f"frames={self.frames} and clips={self.clips} must each be at least 1")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise UserError(f"fps={self.fps} must be above 0; null takes each video's own rate")
        if not self.speeds or not all(0 < speed < math.inf for speed in self.speeds):
            raise UserError(f"speeds={list(self.speeds)} must have a number above 0 for each clip of a start")
        if self.frames * max(self.speeds) > FRAMES.most:
            raise UserError(
                f"a clip of frames={self.frames} at speeds={list(self.speeds)} is longer than the {FRAMES.most:,} "
                "frames that a video may have; lower one of them"
            )

    @property
    def count(self) -> int:
        """V."""
        return self.clips * len(self.speeds)

    def rates(self, index: VideoIndex) -> list[float]:
        """Frames per second of the video, of the clips of one start."""
        fps = index.fps if self.fps is None else self.fps
        return [fps / speed for speed in self.speeds]

    def steady(self, later: int = 0) -> VideoIndex:
        """A video of `fps`, or else 25, frames a second, just long enough for clips that begin with any of its first
        `later` + 1 frames.
        """
        length = later + math.ceil(self.frames * max(1.0, *self.speeds)) + 1
        return VideoIndex(np.arange(length), 1 / (self.fps or 25.0), np.empty(0, np.float32))

    def starts(self, index: VideoIndex, first: int, end: int) -> int:
        """How many frames from `first` on can be the first of a clip that lies in [first, end); 0 if none can."""
        span = (self.frames - 1) / (min(self.rates(index)) * index.tick_s)
        # Times are rounded to ticks, of which a frame may last one or thousands.
        latest = index.ticks[end - 1] - span + min(1.0, 0.1 / (index.fps * index.tick_s))
        return int(np.searchsorted(index.ticks[first:end], latest, side="right")) if end - first >= self.frames else 0

    def numbers(self, index: VideoIndex, first: int, end: int, start: int) -> np.ndarray:
        """The frames of the clips of one start, int64 [S T]."""
        steps_S1 = 1 / (np.array(self.rates(index)) * index.tick_s)[:, None]
        return np.clip(index.nearest(index.ticks[start] + np.arange(self.frames) * steps_S1), first, end - 1)


def require_clips(times: ClipTimes, size: int, views: Views | None) -> None:
    """Raises: UserError for more numbers of the clips of a sample than the limit; frames are `size` x `size` pixels."""
    numbers = times.count * times.frames * numbers_of_views(views, size)
    require_numbers(numbers, frames=times.frames, clips=times.clips, speeds=[*times.speeds], size=size)


@dataclass(frozen=True)
class ClipFields:
    """Makes the fields of clips from frames; all frames of a start, at all its speeds, get the same view.

    Args:
        image: makes the frames; its views are one that is drawn first, or none.
        speeds: S.
    Raises: UserError for other views.
    """

    image: ImageFields
    speeds: int = 1

    def __post_init__(self) -> None:
        views = self.image.views
        if views is not None and (views.drawn is None or len(views.drawn.renderings) != 1):
            raise UserError(
                "views of a clip are one that is drawn first, the same for all its frames, such as RandomViews with "
                "count=1; set data.init_args.clips for several clips of a video"
            )

    def __call__(self, starts: Sequence[Tensor], seeds: Sequence[int]) -> dict[str, Any]:
        """The clips [C T H W], those of one start side by side, or what the device makes them from.

        Args:
            starts: uint8 [S T C H W] each.
            seeds: of their views.
        """
        made = [self.image(frames.flatten(0, 1), seed) for frames, seed in zip(starts, seeds, strict=True)]
        clips = [clip for one in made for clip in self._divided(one["views"][0] if "views" in one else one["image"])]
        if "drawn" not in made[0]:
            return {"views": clips}
        drawn = torch.cat([one["drawn"] for one in made])
        return {"clips": clips, "drawn": drawn, "seed": torch.stack([one["seed"] for one in made])}

    def _divided(self, frames: Tensor) -> list[Tensor]:
        return [clip.transpose(0, 1) for clip in frames.unflatten(0, (self.speeds, -1))]

    def attach(self, data: LightningDataModule) -> None:
        """Lets `data` finish its batches when they are on the device, if that is where views are made."""
        if self.image.made_on == "device":
            finish_on_device(data, partial(_finished, self.image.device_views(), self.speeds))


def _finished(made: DeviceViews, speeds: int, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its clips, made on their device."""
    rest = {name: value for name, value in batch.items() if name not in ("clips", "drawn", "seed")}
    clips = list[Tensor]()
    for at, clip_BCTHW in enumerate(batch["clips"]):
        B, _, T = clip_BCTHW.shape[:3]
        drawn_NP, seed_N = (batch[name][:, at // speeds].repeat_interleave(T, 0) for name in ("drawn", "seed"))
        (view_NChw,) = made(clip_BCTHW.transpose(1, 2).flatten(0, 1), drawn_NP[:, None], seed_N)
        clips.append(view_NChw.unflatten(0, (B, T)).transpose(1, 2))
    return single({"views": clips, **rest}, axis=1)


def single(fields: dict[str, Any], axis: int = 0) -> dict[str, Any]:
    """The fields of a `ClipsBatch`, or of one of its samples, as those of a `ClipBatch` where there is one clip.

    Args:
        axis: of V in the others: 0 of a sample, 1 of a batch.
    """
    if len(fields["views"]) > 1:
        return fields
    rest = {name: value for name, value in fields.items() if name not in ("views", "fps", "frames")}
    return {
        "clip": fields["views"][0],
        "fps": fields["fps"].squeeze(axis),
        "frames": fields["frames"].squeeze(axis),
        **rest,
    }


@dataclass(frozen=True)
class VideoPart:
    """What a sample is: a video, or a shot of it. end: one past its last frame."""

    video: int
    first: int
    end: int
    label: int


@dataclass(frozen=True)
class ClipSamples:
    """Samples of `ClipBatch`, or of `ClipsBatch` where there are several clips of each.

    Args:
        files, indices: the videos.
        parts: what the samples are.
        times: which frames a clip has.
        fields: makes the clips.
        size, fit: of a frame, as in `lightspan.datamodules.image.packed.fitted`.
        drawn: whether starts are drawn from a sample's seed; otherwise they are spread evenly, a single one in the
            middle.
        skip_damaged: True raises `Damaged` for a clip that cannot be read, so that the loader replaces it.
    """

    files: Sequence[Annotated[Path, PathUse.READ]]
    indices: Sequence[VideoIndex]
    parts: Sequence[VideoPart]
    times: ClipTimes
    fields: ClipFields
    size: int
    fit: Fit
    drawn: bool
    skip_damaged: bool = False

    @property
    def batch_type(self) -> type:
        if self.fields.image.made_on == "device":
            return DrawnClipsBatch
        return ClipsBatch if self.times.count > 1 else ClipBatch

    def __len__(self) -> int:
        return len(self.parts)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        part = self.parts[index]
        video, times = self.indices[part.video], self.times
        numbers, seeds = list[np.ndarray](), list[int]()
        room = times.starts(video, part.first, part.end)
        for clip in range(times.clips):
            draws = np.random.default_rng([seed, clip])
            at = int(draws.integers(room)) if self.drawn else (2 * clip + 1) * room // (2 * times.clips)
            numbers.append(times.numbers(video, part.first, part.end, part.first + at))
            seeds.append(int(draws.integers(2**63)))
        starts = self._read(part.video, np.stack(numbers))
        rates = torch.tensor(times.rates(video) * times.clips, dtype=torch.float32)
        made = self.fields(list(starts), seeds)
        shown = torch.from_numpy(np.concatenate(numbers))
        sample = {**made, "fps": rates, "frames": shown, "label": part.label, "index": index}
        return sample if "drawn" in made else single(sample)

    def _read(self, video: int, numbers_KST: np.ndarray) -> Tensor:
        """uint8 [K S T C H W]."""
        file, index = self.files[video], self.indices[video]
        return decoded(file, index, numbers_KST, self.size, self.fit, self.skip_damaged)


def decoded(
    path: Path, index: VideoIndex, numbers: np.ndarray, size: int, fit: Fit, skip_damaged: bool = False
) -> Tensor:
    """The frames of these numbers, uint8 [... C H W]. Each is decoded once.

    Args:
        numbers: int64 [...], places in the index.
        size, fit: as in `lightspan.datamodules.image.packed.fitted`.
        skip_damaged: as in `ClipSamples`.
    """

    def make(picture_HW3: np.ndarray) -> Tensor:
        return fitted(torch.from_numpy(picture_HW3).permute(2, 0, 1), size, fit, 0)

    wanted, places = np.unique(numbers, return_inverse=True)
    try:
        frames = torch.stack(read_frames(path, index, wanted.tolist(), make))
    except UserError:  # of this machine, not of the video
        raise
    except (ValueError, OSError) as error:
        raise unreadable(path, error, skip_damaged) from error
    return frames[torch.from_numpy(places.reshape(numbers.shape))]


@dataclass(frozen=True)
class BlackClips(ClipSamples):
    """Those of videos that are not here: every frame is black."""

    def _read(self, video: int, numbers_KST: np.ndarray) -> Tensor:
        return torch.zeros(*numbers_KST.shape, 3, self.size, self.size, dtype=torch.uint8)
