"""Recordings from tar shards, such as LibriSpeech packed by `lightspan data pack`."""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.audio.batch import AudioBatch
from lightspan.datamodules.audio.segments import WaveReader
from lightspan.datamodules.audio.sound import SOUNDS
from lightspan.datamodules.shards.decoders import decode_class, place_of
from lightspan.datamodules.shards.headers import UNDECODABLE
from lightspan.datamodules.shards.stream import Decoding, Shards


@dataclass(frozen=True)
class RecordingDecoding(Decoding):
    """The wave of a sample, and its class where it has a .cls member.

    Args:
        reader: makes the waves.
        drawn: whether the segment of a long recording is drawn from a sample's seed; otherwise it is the middle one.
    """

    batch_type = AudioBatch

    reader: WaveReader
    drawn: bool = True

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        where = place_of(members)
        ending = next((ending for ending in SOUNDS if ending in members), None)
        if ending is None:
            there = ", ".join(name for name in members if not name.startswith("__"))
            raise UserError(f"{where} has no .{' or .'.join(SOUNDS)} member; it has {there}")
        try:
            wave = self.reader(members[ending], seed if self.drawn else None)
            ending = "cls"
            label = decode_class(members["cls"]) if "cls" in members else 0
        except UNDECODABLE as error:
            raise UserError(f"{where}: its .{ending} member cannot be decoded: {error}") from error
        return {**wave, "label": torch.tensor(label)}

    def plain(self) -> Self:
        return replace(self, drawn=False)


class RecordingShards(Shards):
    """Batches are `AudioBatch`. Order, resume, damage and memory are those of `Shards`.

    In training a recording that is longer than `seconds` gives a segment that is drawn anew in each epoch, in
    evaluation the middle one.

    Args:
        shards, val_shards: as in `Shards`, of members KEY.flac, .wav, .ogg or .mp3, and perhaps KEY.cls, a class;
            samples without one have label 0.
        rate: of the waves in Hz, to which all are resampled.
        seconds: of the longest segment, which all waves are padded to.
        level_db: root mean square of each segment in dB of full scale; None leaves levels as they are.
        settings: `batch_size`, `window`, `seed`, `num_workers`, `skip_damaged` and the others of `Shards` that are not
            about images.
    """

    def __init__(
        self,
        shards: list[ReadPath],
        val_shards: list[ReadPath] | None = None,
        rate: int = 16_000,
        seconds: float = 15.0,
        level_db: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(shards, val_shards, fields={"wave": "|".join(SOUNDS)}, **settings)
        self.rate, self.reader = rate, WaveReader(rate, seconds, level_db)
        self.decode = RecordingDecoding(**vars(self.decode), reader=self.reader)

    def example(self) -> dict[str, Any]:
        """A silent recording of the greatest length."""
        silence = self.reader.padded(np.zeros(self.reader.samples, dtype=np.float32))
        return {**silence, "label": torch.tensor(0)}
