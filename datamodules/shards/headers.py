"""Reads the headers of picture files, and finds damaged ones while decoding few of them. Without torch."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from lightspan.core.files.foreign import PIXELS, content_of

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_OF_A_TIFF = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L"}
"""Modes of Pillow that say what is black and what is white: floats and numbers of 32 bits do not."""
_PNG = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG, by its type of colours
# (first column, first row, steps of both) of the seven passes of an interlaced PNG: PNG specification, section 8.2.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIXELS_OF_A_PNG, _MOST_OTHERS = (b"IDAT", b"fdAT", b"fcTL"), 10_000
MOST_LOOKED_AT = 20_000
"""Files of a folder that `damaged` is to look at: each takes 0.2 to 0.4 ms of a core."""
_JPEG_END, _TAIL = b"\xff\xd9", 2**16  # programs write their own after it

# What the decoders raise on bytes that are not what their ending says; Pillow and json add the last four.
UNDECODABLE = (
    ValueError,
    TypeError,
    OSError,
    EOFError,
    MemoryError,
    SyntaxError,
    RecursionError,
    struct.error,
    Image.DecompressionBombError,
)


def open_image(content: bytes) -> Image.Image:
    """An image of which only the header was read, and of a PNG the checksums; of several, the first.

    Raises: ValueError above the limit of `PIXELS`, for what is not an image, and for a PNG with a wrong checksum.
    """
    Image.MAX_IMAGE_PIXELS = PIXELS.most  # Pillow refuses twice as many by itself
    if content.startswith(_PNG):
        _require_whole_parts(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        what = "it is not a JPEG, PNG, WebP, BMP, GIF or TIFF image" if content else "it is empty"
        raise ValueError(what) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"its pixels exceed the limit of {PIXELS.most:,}, which {PIXELS.setting} sets") from error
    PIXELS.require(image.width * image.height)
    if image.format == "TIFF" and image.mode not in _OF_A_TIFF:
        raise ValueError(f"it is a TIFF of mode {image.mode}, which has no shades; TiffFolder reads bands")
    return image


def _require_whole_parts(content: bytes) -> None:
    """Of a PNG; a part that is cut short shows when it is decoded.

    Raises: ValueError for a part that is not what its checksum says, which decoders pass over, so that what follows is
        black; and for very many parts that are not pixels, each of which Pillow reads.
    """
    view, others = memoryview(content), 0
    for kind, begin, end in _parts(content):
        others += kind not in _PIXELS_OF_A_PNG
        if others > _MOST_OTHERS:
            raise ValueError(f"it is a PNG of more than {_MOST_OTHERS:,} parts that are not pixels")
        if end + 4 <= len(content) and zlib.crc32(view[begin - 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError(f"its checksum at byte {end:,} is wrong: the PNG is damaged")


def _parts(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, where its data begin, where they end) of each part of a PNG; the last may end beyond the content."""
    at = len(_PNG)
    while at + 12 <= len(content):
        begin = at + 8
        end = begin + int.from_bytes(content[at : at + 4], "big")
        yield content[at + 4 : begin], begin, end
        at = end + 4


def require_all_rows(image: Image.Image, content: bytes) -> None:
    """Decodes an image. Pillow leaves zero what the pixels of a PNG do not reach, so the bytes are counted of one that
    ends in two rows of zeros.

    Raises: ValueError for a PNG whose pixels end before its last row; others of `UNDECODABLE` if damaged.
    """
    image.load()
    if image.format != "PNG" or image.crop((0, image.height - 2, *image.size)).tobytes().strip(b"\0"):
        return
    data = {kind: content[begin:end] for kind, begin, end in _parts(content)}
    packed = b"".join(content[begin:end] for kind, begin, end in _parts(content) if kind == b"IDAT")
    width, height, bits, colours, *_, interlaced = struct.unpack(">IIBBBBB", data[b"IHDR"])
    size = 0
    for x, y, step_x, step_y in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = len(range(x, width, step_x)), len(range(y, height, step_y))
        # Each row begins with a byte that says how it is filtered.
        size += rows * (1 + (columns * bits * _CHANNELS[colours] + 7) // 8) if columns else 0
    try:
        there = len(zlib.decompressobj().decompress(packed, size))
    except zlib.error as error:
        raise ValueError(f"its pixels cannot be unpacked: {error}") from error
    if there < size:
        raise ValueError(f"its pixels are cut short: it has {there:,} of {size:,} bytes")


def looked_at(count: int, most: int = MOST_LOOKED_AT) -> list[int]:
    """The numbers of those of `count` files that are looked at: all, or `most` of them, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


def damaged(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """{name: why} of the files that cannot be decoded, as far as headers, the checksums of a PNG and the end of a JPEG
    tell: only files in which one of these is wrong are decoded. The rest of what is damaged shows when it is decoded.
    """
    return {name: why for name in names if (why := _fault(folder / name)) is not None}


def _fault(path: Path) -> str | None:
    try:
        content = content_of(path)
        if _is_suspect(content):
            open_image(content).load()
    except UNDECODABLE as error:
        reason = error.strerror if isinstance(error, OSError) else None
        return reason or str(error) or type(error).__name__
    return None


def _is_suspect(content: bytes) -> bool:
    try:
        with open_image(content) as image:
            kind = image.format
            image.verify()  # the form of a PNG and of a WebP
    except UNDECODABLE:
        return True
    return kind == "JPEG" and _JPEG_END not in content[-_TAIL:]
