"""Arrays in NumPy's files that others may have written: .npy and .npz, without pickles, within `NUMBERS`."""

import io
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import numpy as np

from lightspan.core.errors import first_lines
from lightspan.core.files.foreign import BYTES, NUMBERS, opened_regular

_DAMAGE = (ValueError, TypeError, OSError, EOFError, SyntaxError, TokenError, MemoryError, RecursionError)
"""What NumPy raises for a file that is none: its header is the text of a Python mapping."""


def read_array(source: bytes | Path) -> np.ndarray:
    """The array of a .npy file, or of the bytes of one. Raises: ValueError for anything else, and above the limit."""
    if isinstance(source, bytes):
        return _array(io.BytesIO(source))
    with opened_regular(source) as file:
        return _array(file)


def read_arrays(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of a .npz file by name. Raises: ValueError as `read_array`."""
    with opened_regular(path) as file:
        try:
            with ZipFile(file) as archive:
                sizes = {member.filename: member.file_size for member in archive.infolist()}
                BYTES.require(sum(sizes.values()))
                content = {name.removesuffix(".npy"): archive.read(name) for name in sizes if name.endswith(".npy")}
        # The last two: packed or locked in ways that Python does not read.
        except (BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"it is no .npz file: {error}") from error
    return {name: read_array(array) for name, array in content.items()}


def mapped_array(path: Path) -> np.ndarray:
    """The array of a .npy file, whose numbers stay on disk until they are used. Raises: ValueError as `read_array`."""
    with opened_regular(path):
        pass
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except _DAMAGE as error:
        raise ValueError(f"it is no .npy file: {first_lines(error)}") from error


def _array(file: BinaryIO | io.BytesIO) -> np.ndarray:
    try:
        version: Any = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        numbers = math.prod(shape)
    except _DAMAGE as error:
        raise ValueError(f"it is no .npy file: {first_lines(error)}") from error
    NUMBERS.require(numbers)
    at = file.tell()
    if not dtype.hasobject and file.seek(0, io.SEEK_END) - at < numbers * dtype.itemsize:
        raise ValueError(f"it is cut short: {numbers:,} numbers of {dtype} are not there")
    file.seek(0)
    try:
        return np.lib.format.read_array(file, allow_pickle=False)
    except _DAMAGE as error:
        raise ValueError(f"it is no .npy file that can be read: {first_lines(error)}") from error
