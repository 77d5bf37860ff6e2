"""Speech from a source and filters, with the phone of every frame and the speaker known: no recording, no download.

A speaker is a pitch and a spectral tilt, a phone a pair of formants; phones follow each other by a Markov grammar and
last 50 to 150 ms. Pulses at the speaker's pitch, or noise for a fifth of the phones, pass two resonances, whose places
vary from utterance to utterance and glide from phone to phone. White noise at a stated distance lies over all. What is
not modelled: stops, further formants, rhythm, and the melody of a sentence but for a slow rise and fall.
Shapes: B utterances, S samples, P phones of an utterance, C steps of 8 ms of the filters, T frames, K frequencies.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.rendered.batch import SpeechBatch
from lightspan.datamodules.rendered.data import DrawnSets, RenderedSamples
from lightspan.datamodules.rendered.draws import Draws

RATE = 16_000
WINDOW, HOP = RATE * 25 // 1000, RATE // 100
"""Samples of a frame and from one to the next, of which `phone` says the phone."""
FIRST, SECOND = (300.0, 450.0, 600.0, 800.0), (900.0, 1250.0, 1650.0, 2150.0, 2700.0)
"""Hz: each pair is a phone."""
PHONES, SPEAKERS = len(FIRST) * len(SECOND), 10
FORMANTS_P2 = np.array([(first, second) for first in FIRST for second in SECOND], dtype=np.float32)
VOICELESS_P = np.arange(PHONES) % 5 == 3
PITCH_K = (90 * (240 / 90) ** (np.arange(SPEAKERS) / (SPEAKERS - 1))).astype(np.float32)
TILT_K = (0.3 + np.arange(SPEAKERS) * 7 % SPEAKERS / (SPEAKERS - 1)).astype(np.float32)
"""By speaker: Hz, and the power of the frequency by which the source falls."""
FOLLOWERS = 4
"""Phones that may follow one; the first is three times as likely as the last."""
SHORTEST, LONGEST = 0.05, 0.15  # seconds of a phone
STEP, SPAN = 128, 256  # samples from one filter to the next, and through one
LOUDNESS = 0.05  # root mean square before noise
BANDWIDTHS = (90.0, 140.0)  # Hz, of the two formants
REST = 0.03  # of the source passes beside the formants


def grammar() -> tuple[np.ndarray, np.ndarray]:
    """(the phones that may follow each, int64 [PHONES FOLLOWERS], their probabilities added up, [FOLLOWERS])."""
    draws = Draws(0, np.arange(PHONES))
    keys = draws.uniform(PHONES)
    np.fill_diagonal(keys, 2.0)  # no phone follows itself
    share = np.linspace(3, 1, FOLLOWERS)
    return np.argsort(keys, axis=1)[:, :FOLLOWERS], np.cumsum(share / share.sum())


class Utterances(NamedTuple):
    """wave: float32 [B, S], 0 behind `length`, int64 [B]; speaker: int64 [B]; phone: int64 [B, T], -1 behind."""

    wave: np.ndarray
    length: np.ndarray
    speaker: np.ndarray
    phone: np.ndarray


def utterances(seed: int, numbers: np.ndarray, seconds: float, shortest: float, noise_db: float | None) -> Utterances:
    """Those of the numbers, int64 [B], each a function of (seed, number) alone.

    Args:
        seconds, shortest: of an utterance, at most and at least.
        noise_db: mean power of the speech over that of the noise, in dB; None adds no noise.
    """
    draws, samples = Draws(seed, numbers, 1), round(seconds * RATE)
    speaker_B = draws.integers(SPEAKERS)
    length_B = (draws.between(shortest, seconds) * RATE).astype(np.int64).clip(WINDOW, samples)
    at_S = np.arange(samples)
    phone_BP, end_BP = _chain(draws, samples)
    spoken_BS = at_S < length_B[:, None]
    middle_C = np.arange(0, samples + SPAN, STEP)
    of_step_BC = _phone_at(phone_BP, end_BP, middle_C)
    said = np.take(FORMANTS_P2, of_step_BC, axis=0) * draws.between(0.92, 1.08, 1, 2)
    gain_BCK = _gains(_glided(said), TILT_K[speaker_B])
    voiceless_BS = VOICELESS_P[_phone_at(phone_BP, end_BP, at_S)]
    source_BS = np.where(voiceless_BS, 0.1 * draws.normal(samples), _pulses(draws, PITCH_K[speaker_B], at_S))
    wave_BS = _filtered(source_BS, gain_BCK) * spoken_BS
    power_B1 = np.square(wave_BS).sum(axis=1, keepdims=True) / length_B[:, None]
    wave_BS *= LOUDNESS / np.sqrt(power_B1)
    if noise_db is not None:
        wave_BS += spoken_BS * draws.normal(samples) * np.float32(LOUDNESS * 10 ** (-noise_db / 20))
    frame_T = np.arange(1 + (samples - WINDOW) // HOP) * HOP
    phone_BT = _phone_at(phone_BP, end_BP, frame_T + WINDOW // 2)
    phone_BT = np.where(frame_T + WINDOW <= length_B[:, None], phone_BT, -1)
    return Utterances(wave_BS.astype(np.float32), length_B, speaker_B, phone_BT)


def _chain(draws: Draws, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """(phones, int64 [B P], the sample at which each ends, int64 [B P]); the last ends behind the utterance."""
    followers, added_up = grammar()
    most = int(samples / RATE / SHORTEST) + 2
    duration_BP = draws.between(SHORTEST, LONGEST, most)
    choice_BP = np.searchsorted(added_up, draws.uniform(most)).clip(0, FOLLOWERS - 1)
    phone_BP = np.empty((draws.count, most), dtype=np.int64)
    phone_BP[:, 0] = draws.integers(PHONES)
    for place in range(1, most):
        phone_BP[:, place] = followers[phone_BP[:, place - 1], choice_BP[:, place]]
    return phone_BP, (np.cumsum(duration_BP, axis=1) * RATE).astype(np.int64)


def _phone_at(phone_BP: np.ndarray, end_BP: np.ndarray, at_N: np.ndarray) -> np.ndarray:
    """The phone at each sample number, [B N]."""
    places = (np.searchsorted(ends, at_N, side="right") for ends in end_BP)
    return np.stack([phones[place.clip(0, len(phones) - 1)] for phones, place in zip(phone_BP, places, strict=True)])


def _glided(said_BC2: np.ndarray) -> np.ndarray:
    """Means over five steps of the filters, 40 ms."""
    padded = np.pad(said_BC2, ((0, 0), (2, 2), (0, 0)), mode="edge")
    return np.mean([padded[:, at : at + said_BC2.shape[1]] for at in range(5)], axis=0)


def _gains(formants_BC2: np.ndarray, tilt_B: np.ndarray) -> np.ndarray:
    """Of each frequency in each step, float32 [B C K]."""
    frequency_K = np.fft.rfftfreq(2 * SPAN, 1 / RATE).astype(np.float32)
    gain = np.float32(REST)
    for formant_BC, width in zip(np.moveaxis(formants_BC2, 2, 0), BANDWIDTHS, strict=True):
        gain = gain + 1 / np.sqrt(1 + np.square((frequency_K - formant_BC[..., None]) / np.float32(width / 2)))
    falls_BK = (frequency_K.clip(100) / 500) ** -tilt_B[:, None]
    return gain * falls_BK[:, None]


def _pulses(draws: Draws, pitch_B: np.ndarray, at_S: np.ndarray) -> np.ndarray:
    """One at each turn of a phase that rises by the pitch, which is off by up to 4 % and rises and falls by 5 %."""
    pitch_B1 = (pitch_B * draws.between(0.96, 1.04))[:, None]
    sway = np.sin(2 * np.pi * (at_S / RATE * draws.between(0.5, 2.0)[:, None] + draws.uniform()[:, None]))
    phase_BS = np.cumsum(pitch_B1 * (1 + 0.05 * sway), axis=1, dtype=np.float64) / RATE + draws.uniform()[:, None]
    return np.diff(np.floor(phase_BS), axis=1, prepend=0.0).clip(0, 1).astype(np.float32)


def _filtered(source_BS: np.ndarray, gain_BCK: np.ndarray) -> np.ndarray:
    """Windows of the source, each with the gains of its middle, laid over one another."""
    batch, samples = source_BS.shape
    steps = -(-samples // STEP) + 1
    padded = np.zeros((batch, (steps + 1) * STEP), dtype=np.float32)
    padded[:, STEP : STEP + samples] = source_BS
    window = np.hanning(SPAN + 1)[:-1].astype(np.float32)  # overlapping ones add up to 1
    frames = np.lib.stride_tricks.sliding_window_view(padded, SPAN, axis=1)[:, ::STEP] * window
    spectra = np.fft.rfft(frames, 2 * SPAN, axis=2) * gain_BCK[:, :steps]
    pieces = np.fft.irfft(spectra, axis=2)
    # Gains have no phase: what they ring before a window is at the end of its piece.
    pieces = np.roll(pieces, STEP, axis=2).reshape(batch, steps, 4, STEP)
    laid = np.zeros((batch, steps + 3, STEP), dtype=np.float32)
    for part in range(4):
        laid[:, part : part + steps] += pieces[:, :, part]
    return laid.reshape(batch, -1)[:, 2 * STEP : 2 * STEP + samples]


class SpeechSamples(RenderedSamples):
    """Samples of `SpeechBatch`."""

    batch_type = SpeechBatch

    def __init__(self, first: int, count: int, draw_seed: int, **drawn: Any) -> None:
        super().__init__(first, count)
        self.draw_seed, self.drawn = draw_seed, drawn

    def draw(self, numbers: np.ndarray, seeds: np.ndarray) -> dict[str, Any]:
        said = utterances(self.draw_seed, numbers, **self.drawn)
        fields = {"wave": said.wave, "length": said.length, "label": said.speaker, "phone": said.phone}
        return {name: torch.from_numpy(field) for name, field in fields.items()}


class RenderedSpeech(DrawnSets):
    """Utterances of generated speech: batches of `SpeechBatch`, at 16 kHz. Labels are the 10 speakers.

    Args:
        seconds: of the longest utterance, which all are padded to, at least 0.1.
        shortest: of the shortest, in (0, seconds]; lengths are uniform between both.
        noise_db: mean power of the speech over that of white noise, in dB; None adds no noise.
        settings: those of `DrawnSets`.
    """

    rate, num_classes = RATE, SPEAKERS

    def __init__(
        self, seconds: float = 2.0, shortest: float = 1.0, noise_db: float | None = 20.0, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if seconds < 0.1 or not 0 < shortest <= seconds:
            raise UserError(
                f"RenderedSpeech seconds={seconds} must be at least 0.1, and shortest={shortest} in (0, seconds]"
            )
        require_numbers(seconds * RATE, seconds=seconds)
        self.seconds, self.shortest, self.noise_db = seconds, shortest, noise_db

    def sets(self) -> Callable[[int, int], SpeechSamples]:
        drawn = {"seconds": self.seconds, "shortest": self.shortest, "noise_db": self.noise_db}
        return lambda first, count: SpeechSamples(first, count, self.draw_seed, **drawn)

    def described(self) -> str:
        return f"{self.shortest:g} to {self.seconds:g} s of {SPEAKERS} speakers and {PHONES} phones"
