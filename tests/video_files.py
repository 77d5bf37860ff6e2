"""Small videos, written by PyAV."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

SIDE = 32


def numbered(count: int, side: int = SIDE, first: int = 0) -> np.ndarray:
    """uint8 [N H W 3]: frame n has a grey that tells its number, over noise that does not move, 8 apart."""
    noise = np.random.default_rng(0).integers(0, 3, (side, side, 3))
    return np.stack([noise + 8 * number for number in range(first, first + count)]).astype(np.uint8)


def number_of(frame: np.ndarray) -> int:
    """Of a frame of `numbered`."""
    return round((float(np.asarray(frame, np.float64).mean()) - 1) / 8)


def write_video(
    path: Path,
    frames: Sequence[np.ndarray] | np.ndarray,
    times_ms: Sequence[int] | None = None,
    rate: int = 25,
    every: int = 5,
    codec: str = "ffv1",
    between: int = 0,
) -> Path:
    """Frames uint8 [H W 3].

    Args:
        times_ms: when each is shown; None shows `rate` a second.
        every: frames from one that is whole to the next.
        between: frames that are guessed from a later one, in a row, at most.
    """
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.codec_context.gop_size = every
        stream.codec_context.max_b_frames = between
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
            frame.time_base = Fraction(1, rate) if times_ms is None else Fraction(1, 1000)
            frame.pts = number if times_ms is None else times_ms[number]
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path
