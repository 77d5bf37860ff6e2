"""Reads the headers of picture files, and finds damaged ones while decoding few of them. Without torch."""

import io
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from lightspan.files import irregular

MAX_PIXELS = 2**26  # of one image, before it is decoded
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
    """An image of which only the header was read. Raises: ValueError above MAX_PIXELS or for what is not an image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is lower
            image = Image.open(io.BytesIO(content), formats=["JPEG", "PNG", "WEBP"])
    except UnidentifiedImageError as error:
        what = "it is not a JPEG, PNG or WebP image" if content else "it is empty"
        raise ValueError(what) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"its pixels exceed the limit of {MAX_PIXELS:,}") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS:,}")
    return image


def looked_at(count: int, most: int = MOST_LOOKED_AT) -> list[int]:
    """The numbers of those of `count` files that are looked at: all, or `most` of them, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


def damaged(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """{name: why} of the files that cannot be decoded, as far as headers, the checksums of a PNG and the end of a JPEG
    tell: only files in which one of these is wrong are decoded. The rest of what is damaged shows when it is decoded.
    """
    return {name: why for name in names if (why := _fault(folder / name)) is not None}


def _fault(path: Path) -> str | None:
    if reason := irregular(path):
        return f"it {reason}"
    try:
        content = path.read_bytes()
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
            image.verify()  # the checksums of all parts of a PNG, and of a WebP its form
    except UNDECODABLE:
        return True
    return kind == "JPEG" and _JPEG_END not in content[-_TAIL:]
