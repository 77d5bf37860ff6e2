"""Any folder of videos as a data module."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch

from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import CachePath, ReadPath
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.augment.fields import ImageFields, Place
from lightspan.datamodules.image.augment.views import Views
from lightspan.datamodules.image.data import held_out
from lightspan.datamodules.image.packed import Fit
from lightspan.datamodules.image.picture_files import Labels, Links, PictureFiles, find_labelled
from lightspan.datamodules.image.sets.small import per_channel
from lightspan.datamodules.loading.damage import report_damage
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets, require_split
from lightspan.datamodules.video.clips import (
    BlackClips,
    ClipFields,
    ClipSamples,
    ClipTimes,
    VideoPart,
    require_clips,
)
from lightspan.datamodules.video.files import VIDEOS
from lightspan.datamodules.video.indices import IndexCache
from lightspan.datamodules.video.reader import VideoIndex, shots

C = TypeVar("C", bound=ClipSamples)


class VideoFolder(SampleSets):
    """Clips of the MP4, MOV, MKV, WebM, AVI and MPEG files below a folder, of any size, length and frame rate.

    An epoch has one clip of each video, or of each of its shots. Training batches are `ClipBatch`, or `ClipsBatch` for
    several clips of a sample; all other batches are `ClipBatch`, of the middle of each. Which frames a clip has and how
    it is augmented is a function of `seed`, the epoch and the sample. Order, ranks and resume are those of
    `ExactLoader`. Frames are upright, whatever the file says of its rotation, RGB and square.

    A video's index (when each of its frames is shown) is made once, from its packets, and kept in a cache; frames are
    decoded when they are asked for.

    Args:
        folder: with or without a sub-folder for each class.
        val_folder: videos for validation, with sub-folders of the same names; None holds out `val_share`.
        frames: of a clip, T.
        fps: frames of a clip per second of the video; None takes each video's own rate. What a clip shows is found by
            the times of the frames, so a variable rate is as good as any.
        clips: drawn for each training sample, at independent times.
        speeds: of the clips of each start, which begin with the same frame and are augmented alike; [1, 2] gives two
            clips each, of which the second covers twice as much time. Bank and validation have the first speed.
        samples: "videos", or "shots": the pieces of a video between cuts, for long films. To find the cuts, each video
            is decoded once.
        cut: of "shots": a cut is before a frame of which more than this share, in [0, 1], has other colours than the
            frame before: half the sum of the differences of their histograms of 64 colours.
        size: height and width of a frame in pixels.
        fit: "crop" scales the shorter side and cuts out the middle, "pad" puts black around the whole.
        views: one view, drawn once for all frames of a clip, such as `RandomViews` with count=1; None trains on the
            frames as they are.
        views_on: "workers", or "device" for views of a whole batch where the model is, from the same numbers.
        mean, std: of each channel of pixels in [0, 1], for standardising.
        batch_size: videos or shots of one optimiser step over all ranks.
        val_share: share of the videos of each class held out, in (0, 1), by a hash of the files' names, see
            `lightspan.datamodules.image.data.held_out`; of the shots of a single video.
        seed: of the order, of the clips and of their views.
        num_workers: processes that read.
        selection: as in `lightspan.datamodules.loading.sample_sets.SampleSets`.
        labels, links: as in `lightspan.datamodules.image.picture_files.find_labelled`.
        skip_damaged: True trains without videos that cannot be read or are too short, and names those found at the
            start; a clip that cannot be decoded later is replaced by another sample, drawn from the seed.
        cache_dir: folder of the indices; None means ~/.cache/lightspan/videos. A recipe may name one below
            ~/.cache/lightspan or `${run}`, a flag any.

    Attributes:
        labelled: whether videos have labels, None before `setup`; without, all labels are 0.
        classes: names of the labels, known after `setup`; none without labels.

    Raises: UserError before the first step for no video, and for damaged or short ones, all of which are named; while
        reading, for a clip that cannot be decoded.
    """

    more_samples = (
        "add videos, name a folder of others to validate on (data.init_args.val_folder), or train on the shots of long "
        "videos (data.init_args.samples=shots)"
    )

    def __init__(
        self,
        folder: ReadPath,
        val_folder: ReadPath | None = None,
        frames: int = 16,
        fps: float | None = None,
        clips: int = 1,
        speeds: tuple[float, ...] = (1.0,),
        samples: Literal["videos", "shots"] = "videos",
        cut: float = 0.3,
        size: int = 112,
        fit: Fit = "crop",
        views: Views | None = None,
        views_on: Place = "workers",
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        batch_size: int = 32,
        val_share: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        labels: Labels = "auto",
        links: Links = "skip",
        skip_damaged: bool = False,
        cache_dir: CachePath | None = None,
        selection: ReadPath | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, selection)
        require_in("(0, 1)", val_share=val_share)
        require_in("[0, 1]", cut=cut)
        require_in("[1, inf)", size=size)
        require_in("(0, inf)", std=std)
        self.folder = expanded(folder, "data.init_args.folder")
        self.val_folder = None if val_folder is None else expanded(val_folder, "data.init_args.val_folder")
        self.times = ClipTimes(frames, fps, clips, tuple(speeds))
        require_clips(self.times, size, views)
        self.fields = ClipFields(ImageFields(per_channel(mean), per_channel(std), views, views_on), len(speeds))
        self.samples, self.cut, self.size, self.fit = samples, cut, size, fit
        self.val_share, self.labels, self.links, self.skip_damaged = val_share, labels, links, skip_damaged
        self.cache = IndexCache(cache_dir)
        self.labelled: bool | None = None
        self.classes: tuple[str, ...] = ()
        self.fields.attach(self)

    def blank(self) -> BlackClips | None:
        """Two videos of black frames, where the folder is not here."""
        if self.folder.exists():
            return None
        steady = self.times.steady()
        return self._training(BlackClips, [], [steady], [VideoPart(0, 0, len(steady), 0)] * 2)

    def setup(self, stage: str | None = None) -> None:
        """Once. Raises: UserError for no video, damaged or short ones, and none left to train or validate with."""
        if self.train is not None:
            return
        training = self._found(self.folder)
        sets = [training] if self.val_folder is None else [training, self._found(self.val_folder).like(training)]
        files = [found.folder / name for found in sets for name in found.names]
        labels = np.concatenate([found.labels for found in sets])
        if self.samples == "shots":
            say("videos: those that were not here before are decoded once, to find their cuts")
        indices = self.cache.indexed(files, self.samples == "shots", self.num_workers)
        parts, damage = self._parts(files, indices, labels)
        report_damage([(files[video], why) for video, why in damage.items()], len(files), "videos", self.skip_damaged)
        here = {part.video for part in parts}
        train, val = self._split(parts, training, here)
        pieces = "shots" if self.samples == "shots" else "videos"
        require_split(f"readable {pieces}", train=train, val=val)
        sound = [index if isinstance(index, VideoIndex) else _NONE for index in indices]
        plain = replace(self.fields.image, views=None, made_on="workers")
        self.train = samples = self._training(ClipSamples, files, sound, train)
        middle = replace(self.times, clips=1, speeds=self.times.speeds[:1])
        self.bank, self.val = (
            replace(samples, parts=chosen, times=middle, fields=ClipFields(plain), drawn=False)
            for chosen in (train, val)
        )
        self.classes, self._content = tuple(training.classes), _content(files, sound, train)
        self.sample_names = [str(files[part.video].relative_to(self.folder)) for part in train]
        self.labelled = bool(self.classes)
        say(
            f"videos: {len(here):,}, {len(train):,} {pieces} for training and {len(val):,} for validation, clips of "
            f"{self.times.frames} x {self.size} x {self.size}, "
            + (f"{len(self.classes):,} classes" if self.classes else "without labels")
        )

    @property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Black and white after standardising, each [3, 1, 1]."""
        image = self.fields.image
        return -image.mean / image.std, (1 - image.mean) / image.std

    def training_content(self) -> str:
        return self._content

    def _training(
        self, kind: type[C], files: Sequence[Path], indices: Sequence[VideoIndex], parts: Sequence[VideoPart]
    ) -> C:
        settings = (self.times, self.fields, self.size, self.fit)
        return kind(files, indices, parts, *settings, drawn=True, skip_damaged=self.skip_damaged)

    def _found(self, folder: Path) -> PictureFiles:
        files = find_labelled(folder, VIDEOS, self.links, self.labels)
        for remark in files.remarks:
            say(f"{folder}: {remark}")
        return files

    def _parts(
        self, files: Sequence[Path], indices: Sequence[VideoIndex | str], labels: np.ndarray
    ) -> tuple[list[VideoPart], dict[int, str]]:
        """(the samples, what is wrong with videos that have none)."""
        parts, damage = list[VideoPart](), dict[int, str]()
        short = 0
        for video, index in enumerate(indices):
            if isinstance(index, str):
                damage[video] = index
                continue
            pieces = shots(index, self.cut) if self.samples == "shots" else [(0, len(index))]
            long = [piece for piece in pieces if self.times.starts(index, *piece)]
            short += len(pieces) - len(long)
            parts += [VideoPart(video, first, end, int(labels[video])) for first, end in long]
            if not long:
                lasts = float(index.ticks[-1] - index.ticks[0]) * index.tick_s
                needs = (self.times.frames - 1) / min(self.times.rates(index))
                damage[video] = (
                    f"it is too short: {'none of its shots has' if self.samples == 'shots' else 'it does not have'} "
                    f"the {self.times.frames} frames and {needs:.2f} s of a clip, of {len(index):,} frames in "
                    f"{lasts:.2f} s; lower data.init_args.frames or speeds, or raise fps"
                )
        if self.samples == "shots" and short:
            say(f"{short:,} shots are shorter than a clip, and are left out")
        return parts, damage

    def _split(
        self, parts: list[VideoPart], training: PictureFiles, here: set[int]
    ) -> tuple[list[VideoPart], list[VideoPart]]:
        """(samples to train on, samples to validate on)."""
        own = [video for video in range(len(training.names)) if video in here]
        if self.val_folder is not None:
            return [part for part in parts if part.video in {*own}], [
                part for part in parts if part.video not in {*own}
            ]
        if len(own) == 1:
            say("one video: some of its shots validate" if len(parts) > 1 else "one video, of which one clip is taken")
            names = [f"{part.first}" for part in parts]
            validates = held_out(names, np.zeros(len(parts), np.int64), self.val_share)
        else:
            held = held_out([training.names[video] for video in own], training.labels[own], self.val_share)
            chosen = {video for video, holds in zip(own, held.tolist(), strict=True) if holds}
            validates = np.array([part.video in chosen for part in parts], dtype=bool)
        return (
            [part for part, holds in zip(parts, validates.tolist(), strict=True) if not holds],
            [part for part, holds in zip(parts, validates.tolist(), strict=True) if holds],
        )


_NONE = VideoIndex(np.zeros(1, np.int64), 1.0, np.empty(0, np.float32))  # of a video that no sample is of


def _content(files: Sequence[Path], indices: Sequence[VideoIndex], parts: Sequence[VideoPart]) -> str:
    """What identifies the training samples: the files by name and size, and which of their frames are whose."""
    digest = hashlib.sha256()
    for part in parts:
        file = files[part.video]
        said = f"{file.name}\0{file.stat().st_size}\0{part.first} {part.end} {part.label}\0"
        digest.update(said.encode("utf-8", "surrogateescape") + indices[part.video].ticks.tobytes())
    return digest.hexdigest()[:32]
