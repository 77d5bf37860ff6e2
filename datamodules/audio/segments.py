"""Segments of recordings as tensors, all of one length.

Shapes: N samples of a recording, S samples of a segment.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.audio.sound import RATES, Source, header, levelled, read, resampled


@dataclass(frozen=True)
class WaveReader:
    """(recording, seed) -> wave, float32 [S], and length, int64.

    Args:
        rate: in Hz, to which all are brought.
        seconds: of the longest segment; S are the samples of it, and zeros follow a shorter recording.
        level_db: root mean square of each segment in dB of full scale; None leaves levels as they are.
    """

    rate: int
    seconds: float
    level_db: float | None = None

    def __post_init__(self) -> None:
        if not RATES[0] <= self.rate <= RATES[1] or not 0 < self.seconds < math.inf:
            raise UserError(
                f"rate={self.rate} Hz must be in [{RATES[0]:,}, {RATES[1]:,}], and seconds={self.seconds} above 0"
            )
        if self.samples < 1:
            raise UserError(f"seconds={self.seconds} at rate={self.rate} Hz is less than one sample; raise seconds")
        require_numbers(self.samples, seconds=self.seconds, rate=self.rate)
        if self.level_db is not None and not -100 <= self.level_db <= 0:
            raise UserError(
                f"level_db={self.level_db} must be in [-100, 0] dB of full scale; -25 is usual for speech, and null "
                "leaves levels as they are"
            )

    @property
    def samples(self) -> int:
        """S."""
        return round(self.seconds * self.rate)

    def __call__(self, source: Source, seed: int | None = None) -> dict[str, Tensor]:
        """Of a recording that is longer than `seconds`, the segment that the seed draws, or the middle one.

        Raises: as `read`.
        """
        said = header(source)
        count = min(said.frames, math.ceil(self.samples * said.rate / self.rate))
        room = said.frames - count
        first = room // 2 if seed is None else int(np.random.default_rng(seed).integers(room + 1))
        wave_N, rate = read(source, first, count)
        return self.padded(resampled(wave_N, rate, self.rate))

    def padded(self, wave_N: np.ndarray) -> dict[str, Tensor]:
        """Cut to S samples, levelled, and filled with zeros."""
        wave_N = wave_N[: self.samples]
        if self.level_db is not None:
            wave_N = levelled(wave_N, self.level_db)
        wave_S = torch.zeros(self.samples)
        wave_S[: len(wave_N)] = torch.from_numpy(wave_N)
        return {"wave": wave_S, "length": torch.tensor(len(wave_N))}
