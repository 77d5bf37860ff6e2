"""What data modules of recordings share: samples read when they are asked for, and what is said of them at the start.

Shapes: N recordings, S samples.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from lightspan.core.files.places import PathUse
from lightspan.datamodules.audio.batch import AudioBatch, SpokenBatch
from lightspan.datamodules.audio.segments import WaveReader
from lightspan.datamodules.audio.sound import header, is_clipped, is_silent, read
from lightspan.datamodules.loading.damage import report_damage, unreadable
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SplitSampleSets, require_split

LISTENED = 500
"""Recordings, spread evenly, that are decoded before training starts; of all others the header alone is read."""


class Recordings:
    """Samples of `AudioBatch`, or with further labels of another that has its fields.

    Args:
        files: N of them.
        labels: int64 [N] of each field.
        reader: makes the waves.
        drawn: whether the segment of a long recording is drawn from a sample's seed; otherwise it is the middle one.
        skip_damaged: True raises `Damaged` for a recording that cannot be read, so that the loader replaces it.
    """

    def __init__(
        self,
        files: Sequence[Annotated[Path, PathUse.READ]],
        labels: Mapping[str, np.ndarray],
        reader: WaveReader,
        drawn: bool,
        skip_damaged: bool = False,
    ) -> None:
        self.files, self.labels, self.reader, self.drawn = files, labels, reader, drawn
        self.skip_damaged = skip_damaged

    @property
    def batch_type(self) -> type:
        """With further labels a `SpokenBatch`."""
        return SpokenBatch if "keyword" in self.labels else AudioBatch

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        try:
            wave = self.reader(self.files[index], seed if self.drawn else None)
        except (ValueError, OSError) as error:
            raise unreadable(self.files[index], error, self.skip_damaged) from error
        labels = {name: torch.tensor(int(label_N[index])) for name, label_N in self.labels.items()}
        return {**wave, **labels, "index": torch.tensor(index)}


class AudioData(SplitSampleSets):
    """Recordings in files. A subclass finds them.

    Each is mixed to one channel and resampled to `rate`. In training a long one gives a segment of `seconds` that is
    drawn anew in each epoch; in evaluation the middle one. Order, ranks and resume are those of `ExactLoader`.

    Args:
        rate: of the waves, in Hz.
        seconds: of the longest segment, which all waves are padded to.
        level_db: root mean square of each segment in dB of full scale, such as -25; None leaves levels as they are.
        skip_damaged: True trains without recordings that cannot be read and names those found at the start; False
            refuses to start.
        settings: those of `SampleSets`.

    Attributes:
        classes: names of the labels, known after `setup`; none where there are no labels.
    """

    def __init__(
        self,
        rate: int = 16_000,
        seconds: float = 15.0,
        level_db: float | None = None,
        skip_damaged: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.reader = WaveReader(rate, seconds, level_db)
        self.rate, self.skip_damaged = rate, skip_damaged
        self.classes: tuple[str, ...] = ()

    @abstractmethod
    def find(self) -> tuple[list[Path], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(files, labels int64 [N] by field, places of the files in the sets `train`, `val` and `test`)."""

    def setup(self, stage: str | None = None) -> None:
        """Once. Raises: UserError for damaged recordings, unless they are skipped, and for a set without any."""
        if self.train is not None:
            return
        files, labels, parts = self.find()
        damaged = self._heard(files)
        sets = {name: places[~np.isin(places, sorted(damaged))] for name, places in parts.items()}
        require_split("readable recordings", **sets)
        made = {name: self._samples(files, labels, places, False) for name, places in sets.items()}
        self.train = self._samples(files, labels, sets["train"], True)
        self.bank, self.val, self.test = made["train"], made["val"], made["test"]
        digest = hashlib.sha256()
        for place in sets["train"].tolist():
            numbers = [int(label_N[place]) for label_N in labels.values()]
            digest.update(
                f"{files[place]}\0{files[place].stat().st_size}\0{numbers}\0".encode("utf-8", "surrogateescape")
            )
        self._content = digest.hexdigest()[:32]
        say(
            f"recordings: {len(self.train):,} for training and {len(made['val']):,} for validation, at {self.rate:,} "
            f"Hz, of at most {self.reader.seconds:g} s, "
            + (f"{len(self.classes):,} classes" if self.classes else "without labels")
        )

    def training_content(self) -> str:
        return self._content

    def _samples(
        self, files: Sequence[Path], labels: Mapping[str, np.ndarray], places: np.ndarray, drawn: bool
    ) -> Recordings:
        of = {name: label_N[places] for name, label_N in labels.items()}
        return Recordings([files[place] for place in places.tolist()], of, self.reader, drawn, self.skip_damaged)

    def _heard(self, files: Sequence[Path]) -> set[int]:
        """Places of the damaged ones; says what is remarkable about the others."""
        listened = {*np.unique(np.linspace(0, len(files) - 1, min(len(files), LISTENED)).astype(int)).tolist()}
        damage: dict[int, str] = {}
        silent = clipped = lower = 0
        for place, file in enumerate(files):
            try:
                lower += header(file).rate < self.rate
                if place in listened:
                    wave_N, _ = read(file)
                    silent += is_silent(wave_N)
                    clipped += is_clipped(wave_N)
            except (ValueError, OSError) as error:
                damage[place] = str(error)
        report_damage(
            [(files[place], why) for place, why in damage.items()], len(files), "recordings", self.skip_damaged
        )
        of = f"of {len(listened):,} recordings that were listened to"
        if clipped:
            say(f"{clipped:,} {of} are clipped: equal samples at full scale follow one another")
        if silent:
            say(f"{silent:,} {of} are silent; they train as they are")
        if lower:
            say(f"{lower:,} recordings have a sample rate below {self.rate:,} Hz: the highest frequencies are empty")
        return {*damage}
