"""Video files as frames: what a file has, and frames of it by number. MP4, MOV, MKV, WebM, AVI and MPEG, by PyAV.

Shapes: N frames of a video, H W pixels.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np

from lightspan.core.errors import UserError, install_extra
from lightspan.core.files.foreign import FRAMES, PIXELS, bounded_memory, opened_regular
from lightspan.datamodules.video.files import VIDEOS

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_DEMUXERS = "mov,mp4,matroska,webm,avi,mpeg"
"""Others, such as playlists, name further files and addresses, which FFmpeg would open."""
_ACROSS, _DOWN, _LEVELS = 64, 36, 4  # of the pictures whose colours are compared, and of a colour channel
_BOXES = 2**20  # of an MP4 file side by side: hours of fragments of one frame each
_REORDERED = 16
"""Frames by which an old AVI may show a later frame first, as a decoder of H.264 may keep back."""
_SEGMENT = b"\x18\x53\x80\x67"
T = TypeVar("T")


@dataclass(frozen=True)
class VideoIndex:
    """The frames of a video in the order in which they are shown.

    Attributes:
        ticks: int64 [N], when each is shown, ascending.
        tick_s: length of a tick in seconds.
        change: float32 [N], the share of the picture that has other colours than the frame before, in [0, 1], see
            `colours`; NaN of a frame that cannot be decoded. Empty where the video was not decoded.
    """

    ticks: np.ndarray
    tick_s: float
    change: np.ndarray

    def __len__(self) -> int:
        return len(self.ticks)

    @property
    def fps(self) -> float:
        """Frames per second, on average; 1 of a single frame."""
        return (len(self) - 1) / (self.tick_s * float(self.ticks[-1] - self.ticks[0])) if len(self) > 1 else 1.0

    @cached_property
    def middles(self) -> np.ndarray:
        """float64 [N - 1], half way from each frame to the next, in ticks."""
        return (self.ticks[1:] + self.ticks[:-1]) / 2

    def nearest(self, ticks: np.ndarray) -> np.ndarray:
        """The frames shown nearest to these times, int64; of two that are as near, the earlier."""
        return np.searchsorted(self.middles, ticks, side="left")


def index_of(path: Path, through: bool = False) -> VideoIndex:
    """The index of a video, from its packets. The first frame is decoded.

    Args:
        through: decode all frames, for `VideoIndex.change`.
    Raises: ValueError for what is no video or cut short, for damaged packets, for frames without a time, for a first
        frame that cannot be decoded, and above the limits of `PIXELS` and `FRAMES`; UserError without PyAV.
    """
    ticks = list[int]()
    with _opened(path) as (container, stream):
        size = container.size
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise ValueError(f"it is damaged after {len(ticks):,} frames")
            if packet.pts is None:
                raise ValueError(f"frame {len(ticks):,} has no time; write it anew, such as by `ffmpeg -i`")
            ticks.append(packet.pts)
            FRAMES.require(len(ticks))
            if len(ticks) > size:
                raise ValueError(f"its list of frames is damaged: it has {size:,} bytes and names more frames")
        tick_s = float(stream.time_base or 0)
    if not ticks or tick_s <= 0:
        raise ValueError("its video stream has no frame")
    index = VideoIndex(np.unique(np.array(ticks, np.int64)), tick_s, np.empty(0, np.float32))
    if not through:
        read_frames(path, index, [0], lambda picture: picture.shape)
        return index
    change, before = np.full(len(index), np.nan, np.float32), None
    numbers = {tick: number for number, tick in enumerate(index.ticks.tolist())}
    with _opened(path) as (container, stream):
        for frame in _frames(container, stream):
            small = frame.reformat(_ACROSS, _DOWN, "rgb24")
            now = colours(small.to_ndarray())
            if frame.pts is not None and (number := numbers.get(frame.pts)) is not None:
                change[number] = 0 if before is None else np.abs(now - before).sum() / 2
            before = now
    if np.isnan(change).all():
        raise ValueError("none of its frames can be decoded")
    return VideoIndex(index.ticks, tick_s, change)


def colours(picture_HW3: np.ndarray) -> np.ndarray:
    """The share of the pixels in each of 64 parts of the colour cube: float64 [64]."""
    red, green, blue = (picture_HW3 // (256 // _LEVELS)).astype(np.int64).reshape(-1, 3).T
    counts = np.bincount((red * _LEVELS + green) * _LEVELS + blue, minlength=_LEVELS**3)
    return counts / counts.sum()


def shots(index: VideoIndex, threshold: float) -> list[tuple[int, int]]:
    """(first frame, one past the last) of each shot: a cut is before a frame of which more than `threshold` changed,
    and around each that cannot be decoded, which belongs to no shot.
    """
    lost = np.isnan(index.change)
    starts = (index.change > threshold) | lost
    starts[1:] |= lost[:-1]
    firsts = [0, *np.flatnonzero(starts).tolist(), len(index)]
    return [(first, end) for first, end in pairwise(firsts) if end > first and not lost[first]]


def read_frames(path: Path, index: VideoIndex, numbers: Sequence[int], make: Callable[[np.ndarray], T]) -> list[T]:
    """What `make` makes of each of these frames, which it gets upright, uint8 [H W 3].

    Args:
        numbers: places in the index, in any order, also several times.
    Raises: ValueError for a frame that cannot be decoded, and as `index_of`.
    """
    wanted = {int(index.ticks[number]): number for number in numbers}
    first, last = min(wanted), max(wanted)
    made = dict[int, T]()
    # Where a format knows no place to begin at, or one behind the frame, the video is decoded from its beginning.
    for sought in (True, False):
        with _opened(path) as (container, stream):
            if sought:
                container.seek(first, stream=stream)
            late = 0
            for frame in _frames(container, stream):
                tick = frame.pts or 0  # those without are left out
                if tick in wanted:
                    made[wanted[tick]] = make(_upright(frame))
                late += tick > (last if wanted[first] in made else first)
                if len(made) == len(wanted) or late > _REORDERED:
                    break
        if wanted[first] in made:
            break
    if lost := sorted({*numbers} - made.keys()):
        seconds = float(index.ticks[lost[0]] - index.ticks[0]) * index.tick_s
        raise ValueError(f"its frame {lost[0]:,}, {seconds:.2f} s from the beginning, cannot be decoded")
    return [made[number] for number in numbers]


def _upright(frame: "VideoFrame") -> np.ndarray:
    """Turned as the file says; by whole quarters."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def _frames(container: "InputContainer", stream: "VideoStream") -> "Iterator[VideoFrame]":
    """The frames from here on that can be decoded: those after a fault, up to the next that is whole by itself, show
    what the decoder made up.
    """
    from av import FFmpegError

    sound = True
    for packet in container.demux(stream):
        try:
            with bounded_memory():  # a decoder keeps several large pictures at a time
                decoded: Any = packet.decode()
        except FFmpegError:
            sound, decoded = False, []
        for frame in decoded:
            sound = not frame.is_corrupt and (sound or bool(frame.key_frame))
            if sound and frame.pts is not None:
                PIXELS.require(frame.width * frame.height)
                yield frame


@contextmanager
def _opened(path: Path) -> "Iterator[tuple[InputContainer, VideoStream]]":
    try:
        import av
    except ImportError as error:
        raise UserError(f"videos are read by PyAV: {install_extra('video')}") from error
    with opened_regular(path) as file:
        if not (size := os.fstat(file.fileno()).st_size):
            raise ValueError("it is empty")
        _require_end(file, size)
        # The decoder refuses larger pictures before it takes memory for them, whatever the header says.
        limits = {"max_pixels": str(PIXELS.most), "format_whitelist": _DEMUXERS}
        try:
            with bounded_memory():  # a few bytes may say that there are any number of frames
                whole = av.open(file, mode="r", options=limits, metadata_errors="replace")
            with whole as container:
                stream = next((one for one in container.streams.video if not _is_cover(one)), None)
                if stream is None:
                    raise ValueError("it has no video stream")
                if stream.codec_context is None:
                    raise ValueError("its video is of a kind that this FFmpeg does not decode")
                if not (pixels := stream.codec_context.width * stream.codec_context.height):
                    raise ValueError(
                        f"its frames have no size, or more than {PIXELS.most:,} pixels, the limit that "
                        f"{PIXELS.setting} in the environment sets"
                    )
                PIXELS.require(pixels)
                # One thread a process: workers decode side by side, and some decoders differ with several.
                stream.codec_context.thread_count = 1
                stream.codec_context.options = {**limits, "err_detect": "explode"}
                yield container, stream
        except av.FFmpegError as error:
            # FFmpeg's own words, such as "Operation not permitted", do not tell that the file is to blame.
            raise ValueError(f"it is damaged, or no {VIDEOS.formats} (FFmpeg: {error.strerror})") from error


def _is_cover(stream: "VideoStream") -> bool:
    """Whether it is a picture of the cover of a recording."""
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def _require_end(file: BinaryIO, size: int) -> None:
    """Raises: ValueError for a file that ends before its parts do, as far as its format tells."""
    start, at, end = file.read(12), 0, 0
    if start[:4] == b"RIFF":
        end = 8 + int.from_bytes(start[4:8], "little")
    elif start[:4] == b"\x1a\x45\xdf\xa3":  # Matroska and WebM: a header, then one element with everything
        end = _end_of_segment(file, size)
    elif start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        for _ in range(_BOXES + 1):
            if at + 8 > size:
                break
            file.seek(at)
            length, kind = int.from_bytes(file.read(4), "big"), file.read(4)
            if length == 1:
                length = int.from_bytes(file.read(8), "big")
            if length == 0 or not kind.isalnum():  # up to the end, or what another program has added
                break
            at += max(length, 8)
            end = at
        else:
            raise ValueError(f"it has more than {_BOXES:,} parts; write it anew, such as by `ffmpeg -i`")
    file.seek(0)
    if end > size:
        raise ValueError(f"it is cut short: it has {size:,} bytes of {end:,}")


def _end_of_segment(file: BinaryIO, size: int) -> int:
    """0 where it is not known, as of a stream that was written while it came."""
    file.seek(4)
    length, _ = _vint(file)
    if length > size:
        return 0
    file.seek(length, os.SEEK_CUR)
    if file.read(4) != _SEGMENT:
        return 0
    length, unknown = _vint(file)
    return 0 if unknown else file.tell() + length


def _vint(file: BinaryIO) -> tuple[int, bool]:
    """(a number of EBML, whether all its bits are set, which says that a length is not known): RFC 8794, section 4."""
    first = (file.read(1) or b"\0")[0]
    more = 8 - first.bit_length()
    value = int.from_bytes(bytes([first & (0x7F >> more)]) + file.read(more), "big")
    return value, value == (1 << 7 * (more + 1)) - 1
