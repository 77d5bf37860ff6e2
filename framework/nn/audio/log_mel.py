"""Log-mel spectrograms as a module, so that they are made where the network is.

Shapes: B recordings, S samples, T frames, W samples of a window, K frequencies, F mel bands.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.distributed import register_replicated
from lightspan.core.errors import UserError

FLOOR = 1e-10
"""Added to the energy of a band before the logarithm: silence is finite."""
LEAST_DEVIATION = 1e-3
"""Of a band over time; below it a band counts as constant, and rounding is not taken for speech."""


class Spectrogram(NamedTuple):
    """frames_BTF: float32 or wider, 0 on padding. valid_BT: bool, False on padding, which is at the end; the first
    frame of each recording is valid.
    """

    frames_BTF: Tensor
    valid_BT: Tensor


class LogMel(nn.Module):
    """Waves [B S] with their lengths [B] -> a `Spectrogram`: log energies of mel bands, by default with mean 0 and
    variance 1 of each band over the valid frames of an utterance (CMVN).

    A frame is a Hann window of samples; none reaches before the first sample, and all valid ones but the first end
    within the recording, so that padding does not affect them. A recording shorter than a window has one frame, with
    zeros behind its end. The mel scale is HTK's, 2595 log10(1 + f / 700), with triangles of height 1 between
    frequencies in Hz, as torchaudio's MelScale has it, which the authors of TERA use. Computed in float32 or wider
    whatever the precision of the run.

    Args:
        rate: of the waves, in Hz.
        mels: F, at least 1.
        window_ms, hop_ms: of a frame, and from one to the next.
        low, high: of the bands in Hz; high None is half of `rate`.
        normalise: whether each band of an utterance gets mean 0 and variance 1. What is constant becomes 0.
    Raises: UserError for bands that lie between two frequencies of a window, or outside [0, rate / 2].
    """

    filters_KF: Tensor
    window_W: Tensor

    def __init__(
        self,
        rate: int = 16_000,
        mels: int = 80,
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        low: float = 0.0,
        high: float | None = None,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        self.rate, self.mels, self.normalise = rate, mels, normalise
        self.window, self.hop = round(rate * window_ms / 1000), round(rate * hop_ms / 1000)
        high = rate / 2 if high is None else high
        if mels < 1 or self.window < 2 or self.hop < 1 or not 0 <= low < high <= rate / 2:
            raise UserError(
                f"LogMel rate={rate}, mels={mels}, window_ms={window_ms}, hop_ms={hop_ms}, low={low:g} and "
                f"high={high:g}: a window needs two samples, a hop one, and bands must lie in [0, rate / 2], low below "
                "high"
            )
        filters_KF = mel_filters(rate, self.window, mels, low, high)
        if (empty := int((filters_KF.sum(axis=0) == 0).sum())) > 0:
            raise UserError(
                f"LogMel mels={mels}: {empty} bands lie between two frequencies of a window of "
                f"window_ms={window_ms:g}, which are {rate / self.window:g} Hz apart; lower mels or lengthen the window"
            )
        # As the bits of their numbers: a module that is cast to a half type would round these too.
        constants = {
            "filters_KF": torch.from_numpy(filters_KF).float(),
            "window_W": torch.hann_window(self.window, dtype=torch.float32),
        }
        for name, constant in constants.items():
            register_replicated(self, name, constant.view(torch.int32), persistent=False)

    def count(self, length_B: Tensor) -> Tensor:
        """Valid frames of recordings of so many samples, at least 1."""
        return (1 + (length_B - self.window).div(self.hop, rounding_mode="floor")).clamp_min(1)

    def forward(self, wave_BS: Tensor, length_B: Tensor) -> Spectrogram:
        # Half types have no FFT on a processor, and too few digits for energies anywhere.
        with torch.autocast(wave_BS.device.type, enabled=False):
            wave_BS = wide(wave_BS)
            past_BS = torch.arange(wave_BS.shape[1], device=wave_BS.device) >= length_B[:, None]
            wave_BS = wave_BS.masked_fill(past_BS, 0)
            missing = self.window - wave_BS.shape[1]
            if missing > 0:
                wave_BS = nn.functional.pad(wave_BS, (0, missing))
            filters_KF, window_W = (bits.view(torch.float32).to(wave_BS) for bits in (self.filters_KF, self.window_W))
            frames_BTW = wave_BS.unfold(1, self.window, self.hop) * window_W
            x_BTF = (energies(frames_BTW) @ filters_KF + FLOOR).log()
            valid_BT = torch.arange(x_BTF.shape[1], device=wave_BS.device) < self.count(length_B)[:, None]
            if self.normalise:
                x_BTF = normalised(x_BTF, valid_BT)
            return Spectrogram(x_BTF.masked_fill(~valid_BT[..., None], 0), valid_BT)


def energies(frames_BTW: Tensor) -> Tensor:
    """Of each frequency, [B T K]."""
    if not frames_BTW.numel():  # of which torch makes no transform
        return frames_BTW[..., : frames_BTW.shape[2] // 2 + 1]
    return torch.view_as_real(torch.fft.rfft(frames_BTW)).square().sum(dim=-1)


def normalised(x_BTF: Tensor, valid_BT: Tensor) -> Tensor:
    """(x - mean) / deviation of each band over the valid frames of each row; the deviation is at least 1e-3."""
    valid_BT1 = valid_BT[..., None]
    count_B1 = valid_BT.sum(dim=1, keepdim=True).clamp_min(1)
    mean_BF = x_BTF.masked_fill(~valid_BT1, 0).sum(dim=1) / count_B1
    centred_BTF = (x_BTF - mean_BF[:, None]).masked_fill(~valid_BT1, 0)
    deviation_BF = (centred_BTF.square().sum(dim=1) / count_B1).sqrt().clamp_min(LEAST_DEVIATION)
    return centred_BTF / deviation_BF[:, None]


def mel_filters(rate: int, window: int, mels: int, low: float, high: float) -> np.ndarray:
    """Weights of the frequencies of a window in each band, float64 [K F]; see `LogMel`."""
    first, last = (2595 * math.log10(1 + edge / 700) for edge in (low, high))
    edge_F2 = 700 * (10 ** (np.linspace(first, last, mels + 2) / 2595) - 1)
    frequency_K1 = np.linspace(0, rate / 2, window // 2 + 1)[:, None]
    left_F, middle_F, right_F = edge_F2[:-2], edge_F2[1:-1], edge_F2[2:]
    rising_KF = (frequency_K1 - left_F) / (middle_F - left_F)
    falling_KF = (right_F - frequency_K1) / (right_F - middle_F)
    return np.maximum(0.0, np.minimum(rising_KF, falling_KF))
