"""Recordings written for tests, and ones that are wrong in one way each."""

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile", reason="the extra `audio` is not installed")

FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "VORBIS"), "mp3": ("MP3", None)}


def tone(seconds: float = 0.3, rate: int = 16_000, hz: float = 440.0, channels: int = 1) -> np.ndarray:
    """float32 [N] or [N channels]."""
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate).astype(np.float32)
    return wave if channels == 1 else np.stack([wave * (1 - channel) for channel in range(channels)], axis=1)


def written(wave: np.ndarray, kind: str, subtype: str | None = "PCM_16", rate: int = 16_000) -> bytes:
    """As a format of libsndfile's."""
    stream = io.BytesIO()
    soundfile.write(stream, wave, rate, format=kind, subtype=subtype)
    return stream.getvalue()


def encoded(wave: np.ndarray, rate: int = 16_000, ending: str = "wav", subtype: str | None = None) -> bytes:
    kind, usual = FORMATS[ending]
    return written(wave, kind, subtype or usual, rate)


def write_recordings(folder: Path, classes: dict[str, int], ending: str = "wav", **of_tone: float) -> None:
    """So many tones a class, in a sub-folder each; without a sub-folder for the class ""."""
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for place in range(count):
            wave = tone(hz=200 * (number + 1) + 10 * place, **of_tone)  # type: ignore[arg-type]
            (folder / name / f"{place}.{ending}").write_bytes(encoded(wave, ending=ending))


def wav_header(samples: int = 100, rate: int = 16_000, channels: int = 1, values: Sequence[float] = ()) -> bytes:
    """A WAV of float32 with any rate and number of channels, also none."""
    data = struct.pack(f"<{len(values)}f", *values) or bytes(4 * samples * channels)
    fmt = struct.pack("<HHIIHH", 3, channels, rate, rate * 4 * channels, 4 * channels, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def cut(ending: str) -> bytes:
    """The first half of a recording."""
    noise = np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)
    content = encoded(noise, ending=ending)
    return content[: len(content) // 2]


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "text": (b"these are words, not samples\n" * 20, "it is not a WAV, FLAC, OGG or MP3 recording"),
    "no samples": (wav_header(0), "it has 0 samples of 1 channels"),
    "no channels": (wav_header(channels=0), "it is not a WAV, FLAC, OGG or MP3 recording"),
    "an odd rate": (
        wav_header(rate=50),
        r"its header says a sample rate of 50 Hz, which is outside \[1,000, 768,000\]",
    ),
    "beyond 2^31": (wav_header(values=[0.1, -3e9]), r"its sample 1 is not a finite number of at most 2\^31"),
    "NaN": (wav_header(values=[0.1, 0.2, float("nan"), 0.3]), "its sample 2 is not a finite number"),
    "a cut WAV": (encoded(tone())[:5000], r"it is cut short: its header says 9,600 bytes of samples, and 4,956 are"),
    "a cut FLAC": (cut("flac"), "it is cut short|its samples cannot be decoded"),
    "a cut RF64": (
        written(tone(), "RF64")[:5000],
        r"it is cut short: its header says 9,600 bytes of samples, and [0-9,]+ are",
    ),
    "a cut OGG": (cut("ogg"), "it is cut short: its last page does not say"),
    "a cut last page of an OGG": (encoded(tone(), ending="ogg")[:-9], "it is cut short: its last page is not whole"),
    "a cut MP3": (cut("mp3"), "it is cut short: [0-9,]+ samples are there of the"),
    "another format": (
        written(tone(), "AU"),
        "it is a recording of format AU; WAV, FLAC, OGG and MP3 are read",
    ),
}
