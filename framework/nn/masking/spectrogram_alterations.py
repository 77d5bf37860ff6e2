"""Spectrograms altered in time, in frequency and in magnitude, and which of their cells are to be guessed.

Source: Liu, Li, Lee, "TERA", 2020, arXiv 2007.06028, section III, and the authors' code (s3prl), where the two differ.
Draws are functions of seed, step and the recording's number, made where the spectrograms are.
Shapes: B recordings, T frames, F bands, N blocks of frames.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.noise import hashed_noise, hashed_uniform, mixed_seed

TIME, SOURCE, DICE, NOISE, STEP = range(5)
"""Streams of random numbers, mixed into seeds, so that the draws of a frame do not depend on how many follow it."""


class Altered(NamedTuple):
    """frames_BTF: what the network sees. labelled_BTF: bool, the cells whose clean values are to be guessed."""

    frames_BTF: Tensor
    labelled_BTF: Tensor


@dataclass(frozen=True)
class SpectrogramAlterations:
    """Three alterations, drawn for each recording by itself; valid frames alone are altered and labelled.

    - Time: round(share n / width) blocks of `width` frames of the n that are valid, at starts drawn without replacement
      from [0, n - width - 1]; blocks may overlap. One die for all blocks of a recording: they become zero (80 %), show
      the frames at as many other random starts (10 %), or stay (10 %). They are labelled in any case.
    - Frequency: a band of w bands, w uniform in {0 .. whole part of `band` F}, from a uniform start in [0, F - w - 1],
      becomes zero in all frames and is labelled.
    - Magnitude: in a step, with probability `noise`, N(0, deviation^2) is added to all values; it labels nothing.

    Labels are the union of the first two. Where both are off, all valid cells are labelled. A recording that is too
    short for a block, or whose band is empty, may have no label: it then adds nothing to the loss, as in the code,
    which leaves it out of the batch.

    Differences: of overlapping blocks the last shows its frames, where the code leaves the order to an assignment with
    repeated places; noise does not reach padding.

    Args:
        share: of the frames, in [0, 1]; 0 turns time off.
        width: frames of a block, at least 1.
        band: the widest band as a share of all, in [0, 1]; 0 turns frequency off.
        noise: probability in [0, 1]; the authors take 0 (time and frequency) or 0.15.
        deviation: of the noise, at least 0.
        zero, swapped: probabilities of the die, each at least 0, together at most 1.
        seed: at least 0.
    """

    share: float = 0.15
    width: int = 7
    band: float = 0.2
    noise: float = 0.0
    deviation: float = 0.2
    zero: float = 0.8
    swapped: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("share", "band", "noise", "zero", "swapped")}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise UserError(f"SpectrogramAlterations {name}={value} must lie in [0, 1]")
        if self.zero + self.swapped > 1:
            raise UserError(
                f"SpectrogramAlterations zero={self.zero} and swapped={self.swapped} are shares of recordings and must "
                "add up to at most 1"
            )
        if self.width < 1 or self.deviation < 0 or self.seed < 0:
            raise UserError(
                f"SpectrogramAlterations width={self.width} must be at least 1, deviation={self.deviation} and "
                f"seed={self.seed} at least 0"
            )

    def __call__(self, frames_BTF: Tensor, valid_BT: Tensor, index_B: Tensor, step: int) -> Altered:
        """
        Args:
            frames_BTF: 0 on padding.
            index_B: the recordings' numbers in their dataset.
            step: of the optimiser.
        """
        valid_BT1 = valid_BT[..., None]
        if not (self.share or self.band):
            altered_BTF, labelled_BTF = frames_BTF, valid_BT1.expand_as(frames_BTF)
        else:
            altered_BTF, labelled_BTF = frames_BTF, torch.zeros_like(frames_BTF, dtype=torch.bool)
        seed_B = mixed_seed(index_B.to(frames_BTF.device), step, self.seed)
        if self.share:
            altered_BTF, blocks_BT = self._in_time(altered_BTF, valid_BT, seed_B)
            labelled_BTF = labelled_BTF | blocks_BT[..., None]
        if self.band:
            band_BF = self._band(seed_B, frames_BTF.shape[2])
            labelled_BTF = labelled_BTF | (band_BF[:, None] & valid_BT1)
            altered_BTF = altered_BTF.masked_fill(band_BF[:, None], 0)
        if self.noise:
            step_1 = torch.full((1,), step, dtype=torch.int64, device=frames_BTF.device)
            added = hashed_uniform(mixed_seed(step_1, self.seed, STEP), 0, (1,)) < self.noise
            grain_BTF = hashed_noise(mixed_seed(seed_B, NOISE), 0, tuple(frames_BTF.shape[1:])).to(frames_BTF)
            altered_BTF = altered_BTF + (self.deviation * grain_BTF).masked_fill(~(valid_BT1 & added), 0)
        return Altered(altered_BTF, labelled_BTF)

    def _in_time(self, frames_BTF: Tensor, valid_BT: Tensor, seed_B: Tensor) -> tuple[Tensor, Tensor]:
        """(frames with their blocks changed, which frames are in a block: bool [B T])."""
        frames = frames_BTF.shape[1]
        valid_B = valid_BT.sum(dim=1)
        # No recording can have more, and nothing is read from the device.
        most = min(int(self.share * frames / self.width) + 1, max(frames - self.width, 1))
        starts_B = (valid_B - self.width).clamp_min(1)
        count_B = torch.minimum((self.share * valid_B / self.width).round().long(), starts_B)
        start_BN, source_BN = (self._starts(seed_B, stream, starts_B, frames)[:, :most] for stream in (TIME, SOURCE))
        at_T = torch.arange(frames, device=frames_BTF.device)
        offset_BNT = at_T - start_BN[..., None]
        number_N1 = torch.arange(most, device=frames_BTF.device)[:, None]
        inside_BNT = (offset_BNT >= 0) & (offset_BNT < self.width) & (number_N1 < count_B[:, None, None])
        blocks_BT = inside_BNT.any(dim=1) & valid_BT
        last_B1T = (inside_BNT * (number_N1 + 1)).argmax(dim=1, keepdim=True)
        moved_BT = (source_BN[..., None] + offset_BNT).gather(1, last_B1T)[:, 0]
        # The frames of a block that ends behind the last valid one have no other to show than that.
        moved_BT = moved_BT.clamp_min(0).minimum((valid_B - 1).clamp_min(0)[:, None])
        die_B = hashed_uniform(mixed_seed(seed_B, DICE), 0, (3,))[:, 0]
        zero_BT = blocks_BT & (die_B < self.zero)[:, None]
        swapped_BT = blocks_BT & ((die_B >= self.zero) & (die_B < self.zero + self.swapped))[:, None]
        shown_BTF = frames_BTF.gather(1, moved_BT[..., None].expand_as(frames_BTF))
        altered_BTF = torch.where(swapped_BT[..., None], shown_BTF, frames_BTF)
        return altered_BTF.masked_fill(zero_BT[..., None], 0), blocks_BT

    def _starts(self, seed_B: Tensor, stream: int, starts_B: Tensor, frames: int) -> Tensor:
        """The numbers below `starts_B` in a random order, the others behind them: int64 [B T]."""
        drawn_BT = hashed_uniform(mixed_seed(seed_B, stream), 0, (frames,))
        out_BT = torch.arange(frames, device=drawn_BT.device) >= starts_B[:, None]
        return drawn_BT.masked_fill(out_BT, 2.0).argsort(dim=1, stable=True)

    def _band(self, seed_B: Tensor, bands: int) -> Tensor:
        """Which bands become zero, bool [B F]."""
        width_B, at_B = hashed_uniform(mixed_seed(seed_B, DICE), 0, (3,))[:, 1:].unbind(1)
        width_B = (width_B * (int(self.band * bands) + 1)).long()
        start_B = (at_B * (bands - width_B)).long()
        band_F = torch.arange(bands, device=seed_B.device)
        return (band_F >= start_B[:, None]) & (band_F < (start_B + width_B)[:, None])
