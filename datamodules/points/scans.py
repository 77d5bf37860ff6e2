"""LAS and LAZ files by laspy and lazrs, which is Rust and ends its process where it gets no memory: in a process of its
own. Without torch.

Source: LAS specification 1.4-R15, https://github.com/ASPRSorg/LAS (the header's bytes); LAZ by its readers.
"""

import io
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lightspan.core.decoding import Answer, DecoderProcess, serve
from lightspan.core.errors import UserError, install_extra
from lightspan.core.files.foreign import NUMBERS, bounded_memory, content_of
from lightspan.datamodules.points.shapes import Shape, shape_of

MOST_UNPACKED = 2**10
"""Bytes that a byte of a packed scan may become; scans come to about a tenth of their size."""
_ROOM = 2**28  # bytes for what libraries need besides the points
_POINT = 160  # bytes for coordinates and colours of a point, as they are turned and copied
_RECORDS, _RECORD = 100, 54  # where the header has their number, and the least bytes that each takes
_DECODER = DecoderProcess(__name__)


def scan(path: Path) -> Shape:
    """The points of a LAS or LAZ file, with colours if it has them.

    Raises: ValueError for damage, no point, and more than the limits; UserError without the extra `points`.
    """
    try:
        _, arrays = _DECODER.ask(path=str(path.absolute()))
    except ValueError as error:
        if isinstance(error, UserError) or str(error).startswith("it "):
            raise
        raise ValueError(f"it is damaged: {error}") from error
    return Shape(**arrays)


def without(package: str) -> UserError:
    return UserError(f"point clouds and surfaces need {package}, which is not installed: {install_extra('points')}")


def read_here(laspy: Any, content: bytes) -> Shape:
    """What `scan` gives, in this process, which damage may end.

    Raises: whatever laspy and lazrs raise; else as `scan`.
    """
    if content[:4] != b"LASF" or len(content) < _RECORDS + 4:
        raise ValueError("it is damaged, or no LAS or LAZ file" if content else "it is empty")
    (records,) = struct.unpack_from("<I", content, _RECORDS)
    if records * _RECORD > len(content):  # laspy makes up those that are not there
        raise ValueError(f"it is damaged: {len(content):,} bytes are too few for {records:,} records about its points")
    # In one thread: this is a process of its own, beside others that read. Later records are none of ours.
    with laspy.open(io.BytesIO(content), laz_backend=laspy.LazBackend.Lazrs, read_evlrs=False) as file:
        told, size = file.header.point_count, file.header.point_format.size
        NUMBERS.require(3 * told)
        if told * size > MOST_UNPACKED * len(content):
            raise ValueError(f"it is damaged: {len(content):,} bytes are too few for {told:,} points")
        if file.header.are_points_compressed:
            if not laspy.LazBackend.Lazrs.is_available():
                raise without("lazrs, which unpacks LAZ,")
            _require_chunks(content, file.header.offset_to_point_data)
        with bounded_memory(_ROOM + len(content) + told * (2 * size + _POINT)):
            points = file.read_points(-1)
            if len(points) < told:
                raise ValueError(f"it is cut short: its header announces {told:,} points")
            colour, names = None, ("red", "green", "blue")
            if {*names} <= {*points.point_format.dimension_names}:
                deep = np.stack([np.asarray(points[name]) for name in names], axis=1)
                # 16 bits by the format; many programs write 8.
                colour = (deep >> 8 if deep.size and deep.max() > 255 else deep).astype(np.uint8)
            return shape_of(np.stack([np.asarray(points[name], float) for name in "xyz"], axis=1), colour)


def _require_chunks(content: bytes, first: int) -> None:
    """Raises: ValueError for a LAZ file that claims more parts than it has bytes: lazrs makes room for all of them, and
    ends the process if it gets none.
    """
    (at,) = struct.unpack_from("<q", content, first)
    (at,) = struct.unpack_from("<q", content, len(content) - 8) if at == -1 else (at,)
    _, chunks = struct.unpack_from("<II", content, at)
    if not 0 <= at < len(content) or chunks > len(content):
        raise ValueError("it is damaged: its table of parts is not there, or too long")


def _opened() -> partial[Answer]:
    try:
        import laspy
    except ImportError as error:
        raise without("laspy") from error
    return partial(_read, laspy)


def _read(laspy: Any, path: str) -> Answer:
    shape = read_here(laspy, content_of(Path(path)))
    return {}, {name: array for name, array in shape._asdict().items() if array is not None}


if __name__ == "__main__":
    serve(_opened)
