"""Scenes of any number of bands, of TIFFs. Pillow reads three or four bands, of 8 bits; tifffile reads them all.

Shapes: S bands, H W pixels.
"""

import io
import lzma
import math
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lightspan.core.errors import UserError, install_extra
from lightspan.core.files.foreign import NUMBERS, drained, opened_regular

ENDINGS = (".tif", ".tiff")
# What tifffile and the decoders of compressed parts raise beside ValueError and OSError; those of imagecodecs are
# RuntimeErrors, and one that is not installed is an ImportError.
_DAMAGE = (
    LookupError, RuntimeError, TypeError, AttributeError, ImportError, EOFError, MemoryError, struct.error, zlib.error,
    lzma.LZMAError,
)  # fmt: skip

_OF_ONE_FILE = {"is_ome": False, "is_mmstack": False, "is_ndtiff": False}
"""Kinds of microscopes in which a file names others, which tifffile opens too, wherever they are. Without their
descriptions they are pages.
"""


class _PackBits:
    """Counts what PackBits unpacks to, and makes zeros of it: it stands for a decompressor in `drained`."""

    eof = True  # nothing in a part tells its end

    def decompress(self, packed: bytes, most: int) -> bytes:
        """At most `most` zeros; n < 128 is followed by n + 1 bytes as they are, n > 128 by one byte 257 - n times."""
        at = count = 0
        while at < len(packed) and count < most:
            n = packed[at]
            count += n + 1 if n < 128 else (257 - n) % 129
            at += n + 2 if n < 128 else 1 + (n > 128)
        return bytes(min(count, most))


_UNBOUNDED: dict[int, tuple[Callable[[], Any], int]] = {
    # Adobe's deflate, and what it was called before and after.
    **dict.fromkeys((8, 32946, 50013), (zlib.decompressobj, 1032)),
    34925: (lzma.LZMADecompressor, 2**13),
    32773: (_PackBits, 64),
}
"""How to unpack what tifffile unpacks whole, by the number of the compression, and to how many bytes a byte at most."""
if sys.version_info >= (3, 14):
    from compression import zstd

    _UNBOUNDED |= dict.fromkeys((34926, 50000), (zstd.ZstdDecompressor, 2**16))
_MARGIN = 2**17  # bytes


def read_tiff(content: bytes | Path, bands: int | None) -> np.ndarray:
    """[S H W] of the TIFF's own type: whole numbers of up to 32 bits, or floats. Bands may be interleaved by pixel,
    stand one after the other in a page, or be pages.

    Args:
        content: a file, or what is in one.
        bands: S, which tells where the bands are; None takes the TIFF's own word for it.
    Raises: UserError without tifffile; ValueError for a file that is none, above the limit of `NUMBERS`, for complex
        numbers, and where neither axis or both could be that of the bands.
    """
    try:
        import tifffile
    except ImportError as error:
        raise UserError(
            f"reading TIFFs of many bands needs tifffile, which is not installed: {install_extra('satellite')}"
        ) from error
    try:
        with (
            io.BytesIO(content) if isinstance(content, bytes) else opened_regular(content) as stream,
            tifffile.TiffFile(stream, **_OF_ONE_FILE) as file,
        ):
            if not file.series:
                raise ValueError("it has no picture")
            series = file.series[0]
            NUMBERS.require(math.prod(series.shape))
            for page in series.pages:
                _require_honest(stream, page)
            pixels, axes = series.asarray(), series.axes
    except tifffile.TiffFileError as error:
        raise ValueError(f"it is no TIFF: {error}") from error
    except _DAMAGE as error:
        raise ValueError(f"it is a damaged TIFF, or of a kind that tifffile does not read: {error}") from error
    if pixels.dtype.kind not in "uif":
        raise ValueError(f"its numbers are {pixels.dtype}; whole numbers and floats are read")
    return np.ascontiguousarray(bands_first(pixels, bands, interleaved=axes.endswith("S")))


def _require_honest(stream: BinaryIO, page: Any) -> None:
    """tifffile unpacks the parts of a page whole, several at once, whatever size they should have, before it looks at
    them.

    Raises: ValueError for a part, packed with deflate, LZMA, PackBits or Zstandard, that unpacks to more than it
        should, or not at all.
    """
    if page is None or int(page.compression) not in _UNBOUNDED:
        return
    decompressor, growth = _UNBOUNDED[int(page.compression)]
    most = math.prod(page.chunks) * page.dtype.itemsize + _MARGIN
    for at, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        if count * growth > most:
            stream.seek(at)
            try:
                drained(decompressor(), stream.read(count), most)
            except ValueError as error:
                raise ValueError(f"it is a damaged TIFF: {error}") from error


def bands_first(pixels: np.ndarray, bands: int | None, interleaved: bool | None = None) -> np.ndarray:
    """[S H W] of [S H W], [H W S], or [H W] of one band.

    Args:
        bands: S; None lets `interleaved` decide.
        interleaved: what the file says of its order. It decides where both ends have S entries.
    Raises: ValueError where neither end has `bands` entries, or both have and nothing decides.
    """
    if pixels.ndim == 2:
        pixels = pixels[None]
        interleaved = False
    shape = list(pixels.shape)
    if pixels.ndim != 3 or 0 in shape:
        raise ValueError(f"its shape {shape} is not that of bands and two sides")
    if bands is None:
        if interleaved is None:
            raise ValueError(f"nothing says which axis of {shape} is that of the bands; name the bands")
        return np.moveaxis(pixels, 2, 0) if interleaved else pixels
    first, last = shape[0] == bands, shape[2] == bands
    if not (first or last):
        raise ValueError(f"its shape is {shape}, and neither the first nor the last axis has {bands} bands")
    if first and last and interleaved is None:
        raise ValueError(f"its shape is {shape}, so {bands} bands could be the first or the last axis")
    return np.moveaxis(pixels, 2, 0) if last and not (first and not interleaved) else pixels
