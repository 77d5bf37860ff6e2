"""Recordings as waves: read, mixed to one channel, resampled, levelled. WAV, FLAC, OGG and MP3, by libsndfile. Without
torch.

Shapes: N samples of a recording, C channels.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from lightspan.core.errors import UserError, install_extra
from lightspan.core.files.foreign import BYTES, NUMBERS, opened_regular
from lightspan.datamodules.image.picture_files import Kind

if TYPE_CHECKING:
    from soundfile import SoundFile

SOUNDS = ("wav", "flac", "ogg", "mp3")
RECORDINGS = Kind("recording", "WAV, FLAC, OGG or MP3", tuple(f".{ending}" for ending in SOUNDS))
FORMATS = {"WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3"}
RATES = (1_000, 768_000)  # Hz: a header that says another is taken to be damaged
FULL_SCALE, CLIPPED_RUN = 0.99, 3
"""A recording is clipped where so many equal samples follow one another so near the largest number of its format."""
LOUDEST = 2.0**31
"""What whole numbers of 32 bits come to where they stand for floats. What is louder is damage, and has no energy that a
float32 could hold.
"""
_UNKNOWN_SIZES = {0, 0x7FFFF000, 2**32 - 1}
"""Of a WAV's samples, where it was written as a stream; SoX writes the second."""
_VORBIS_BLOCK = 8_192
"""The most samples of a block. An OGG may count the samples of one that its encoder left out at its beginning."""
_LARGEST_PAGE = 65_307  # bytes of an OGG, of which the last says that it is the last
Source = bytes | Path


class Header(NamedTuple):
    """What a recording's header says: samples of each channel, Hz, channels, and the format."""

    frames: int
    rate: int
    channels: int
    format: str


def header(source: Source) -> Header:
    """Raises: ValueError for what is empty, no recording, of no channel or sample, of a rate outside RATES, or cut
    short as far as its beginning and end tell, and for a path that leads to no regular file.
    """
    with _opened(source) as (sound, _):
        return _header(sound)


def read(source: Source, first: int = 0, count: int | None = None) -> tuple[np.ndarray, int]:
    """(mean of the channels, float32 [N], Hz) of `count` samples from `first` on, or of all.

    Raises: ValueError as `header`, above the limits of `NUMBERS` and `BYTES`, and for samples that cannot be decoded,
        are missing, not finite or above LOUDEST.
    """
    with _opened(source) as (sound, errors):
        said = _header(sound)
        count = said.frames - first if count is None else count
        # The place of a sample in an MP3 is known by decoding what is before it, and in a WAV of GSM no other is found.
        skipped = first if said.format == "MP3" or not sound.seekable() else 0
        NUMBERS.require(count * said.channels)
        BYTES.require(4 * (skipped + count) * said.channels)
        try:
            if skipped < first:
                sound.seek(first)
            samples_NC = sound.read(skipped + count, dtype="float32", always_2d=True)[skipped:]
        except errors as error:
            raise ValueError(f"its samples cannot be decoded: {_said(error)}") from error
    lost = count - len(samples_NC)
    if lost > (_VORBIS_BLOCK if said.format == "OGG" and len(samples_NC) else 0):
        raise ValueError(f"it is cut short: {len(samples_NC):,} samples are there of the {count:,} that it should have")
    if not (sound_NC := np.abs(samples_NC) <= LOUDEST).all():
        at = int(np.flatnonzero(~sound_NC.all(axis=1))[0])
        raise ValueError(f"its sample {first + at:,} is not a finite number of at most 2^31, where full scale is 1")
    return samples_NC.mean(axis=1), said.rate


def resampled(wave_N: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """float32 at another rate by a polyphase filter: ceil(N wanted / rate) samples."""
    if rate == wanted or not len(wave_N):
        return wave_N
    from scipy.signal import resample_poly  # takes half a second to import

    divisor = math.gcd(rate, wanted)
    return resample_poly(wave_N, wanted // divisor, rate // divisor).astype(np.float32)


def levelled(wave_N: np.ndarray, level_db: float) -> np.ndarray:
    """Scaled to a root mean square of 10^(level_db / 20), full scale being 1; silence stays what it is."""
    rms = float(np.sqrt(np.square(wave_N, dtype=np.float64).mean())) if len(wave_N) else 0.0
    return wave_N if rms == 0 else wave_N * np.float32(10 ** (level_db / 20) / rms)


def is_silent(wave_N: np.ndarray) -> bool:
    """Whether nothing moves: a constant is silence too."""
    return not len(wave_N) or float(np.ptp(wave_N)) == 0


def is_clipped(wave_N: np.ndarray) -> bool:
    """See CLIPPED_RUN."""
    flat = (np.diff(wave_N) == 0) & (np.abs(wave_N[1:]) >= FULL_SCALE)
    return bool(len(flat) and (np.convolve(flat, np.ones(CLIPPED_RUN - 1)) >= CLIPPED_RUN - 1).any())


@contextmanager
def _opened(source: Source) -> "Iterator[tuple[SoundFile, type[Exception]]]":
    """(the recording, what its reader raises)."""
    try:
        import soundfile
    except ImportError as error:
        raise UserError(f"recordings are read by soundfile: {install_extra('audio')}") from error
    with BytesIO(source) if isinstance(source, bytes) else opened_regular(source) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        if not size:
            raise ValueError("it is empty")
        try:
            sound = soundfile.SoundFile(stream)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"it is not a WAV, FLAC, OGG or MP3 recording: {_said(error)}") from error
        with sound:
            if sound.format not in FORMATS:
                raise ValueError(f"it is a recording of format {sound.format}; WAV, FLAC, OGG and MP3 are read")
            _require_end(stream, size, sound)
            yield sound, soundfile.LibsndfileError


def _header(sound: "SoundFile") -> Header:
    said = Header(sound.frames, sound.samplerate, sound.channels, sound.format)
    if said.channels < 1 or said.frames < 1:
        raise ValueError(f"it has {said.frames} samples of {said.channels} channels, and each must be at least 1")
    if not RATES[0] <= said.rate <= RATES[1]:
        raise ValueError(
            f"its header says a sample rate of {said.rate:,} Hz, which is outside [{RATES[0]:,}, {RATES[1]:,}]"
        )
    return said


def _said(error: Any) -> str:
    return str(getattr(error, "error_string", error)).rstrip(".")


def _require_end(stream: BinaryIO, size: int, sound: "SoundFile") -> None:
    """libsndfile takes what is there for the whole of a WAV or an OGG. Leaves the stream where it was.

    Raises: ValueError for one that is cut short.
    """
    at = stream.tell()
    missing = None
    if sound.format in ("WAV", "WAVEX", "RF64"):
        missing = _missing_of_wav(stream, size)
    elif sound.format == "OGG":
        stream.seek(max(0, size - _LARGEST_PAGE))
        tail = stream.read()
        at_page = tail.rfind(b"OggS")
        page = tail[at_page:] if at_page >= 0 else b""
        # A page begins with 27 bytes, of which the last counts the lengths that follow, those of its parts.
        lengths = page[27 : 27 + page[26]] if len(page) > 26 else b""
        if not page[5:6] or not page[5] & 4:
            missing = "its last page does not say that it is the last"
        elif len(page) < 27 or len(page) < 27 + page[26] + sum(lengths):
            missing = "its last page is not whole"
    stream.seek(at)
    if missing is not None:
        raise ValueError(f"it is cut short: {missing}")


def _missing_of_wav(stream: BinaryIO, size: int) -> str | None:
    at, samples = 12, 0
    while at + 8 <= size:
        stream.seek(at)
        name, length = stream.read(4), int.from_bytes(stream.read(4), "little")
        if name == b"ds64":  # an RF64 may be longer than 32 bits tell: the size of the file, and then of the samples
            samples = int.from_bytes(stream.read(16)[8:], "little")
        if name == b"data":
            there = size - at - 8
            length = samples or length
            if length in _UNKNOWN_SIZES or length <= there:
                return None
            return f"its header says {length:,} bytes of samples, and {there:,} are there"
        at += 8 + length + length % 2
    return None
