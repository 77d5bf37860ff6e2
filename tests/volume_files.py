"""Folders of small NIfTI files and DICOM series, for tests."""

import locale
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel", reason="the extra `volumes` is not installed")
sitk = pytest.importorskip("SimpleITK", reason="the extra `volumes` is not installed")


@contextmanager
def same_locale() -> Iterator[None]:
    """GDCM leaves the locale "C" behind, in which Python opens texts as ASCII from then on."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def write_nifti(path: Path, values: np.ndarray, spacing: tuple[float, float, float] = (1, 1, 1), **header: int) -> Path:
    """values: [D H W], as `VolumeFile.read` gives them; spacing along the same axes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values.transpose(2, 1, 0), np.diag([*spacing[::-1], 1.0]))
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def noise(number: int, shape: tuple[int, ...] = (6, 7, 5)) -> np.ndarray:
    """int16 [D H W], other numbers for each volume, none 0."""
    return np.random.default_rng(number).integers(1, 1000, shape).astype(np.int16)


def write_volumes(folder: Path, count: int, shape: tuple[int, ...] = (6, 7, 5)) -> Path:
    for number in range(count):
        write_nifti(folder / f"s{number}.nii.gz", noise(number, shape))
    return folder


def write_series(folder: Path, values: np.ndarray, series: str = "1.2.3", skip: int = -1) -> Path:
    """values: int16 [D H W], or uint8 [D H W 3] in colours; slices from the foot up, 3 mm apart, one left out."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, part in enumerate(values):
        if number == skip:
            continue
        image = sitk.GetImageFromArray(part[None], isVector=part.ndim == 3)
        image.SetSpacing((1.0, 2.0, 3.0))
        image.SetOrigin((0.0, 0.0, 3.0 * number))
        tags = {"0008|0060": "CT", "0020|000d": "1.2", "0020|000e": series, "0008|0018": f"{series}.{number}"}
        for tag, text in {**tags, "0020|0032": f"0\\0\\{3 * number}", "0020|0037": "1\\0\\0\\0\\1\\0"}.items():
            image.SetMetaData(tag, text)
        writer.SetFileName(str(folder / f"{99 - number:03}.dcm"))  # names do not give the order
        with same_locale():
            writer.Execute(image)
    return folder


def element(group: int, number: int, kind: bytes, value: bytes) -> bytes:
    """Of a DICOM file: PS3.5, section 7.1.2."""
    value += b"\0" * (len(value) % 2)
    length = struct.pack("<HI", 0, len(value)) if kind in (b"OB", b"OW", b"SQ") else struct.pack("<H", len(value))
    return struct.pack("<HH", group, number) + kind + length + value


def dicom(rows: int, columns: int, pixels: bytes, syntax: bytes = b"1.2.840.10008.1.2.1", more: bytes = b"") -> bytes:
    """A slice of 16 bits. more: elements of group 9."""
    shorts = ((0x02, 1), (0x10, rows), (0x11, columns), (0x100, 16), (0x101, 16), (0x102, 15), (0x103, 0))
    head = element(2, 0x10, b"UI", syntax)
    return b"".join(
        [
            *(bytes(128), b"DICM", element(2, 0, b"UL", struct.pack("<I", len(head))), head),
            *(element(8, 0x16, b"UI", b"1.2.840.10008.5.1.4.1.1.2"), more, element(0x20, 0x32, b"DS", b"0\\0\\0")),
            element(0x20, 0x37, b"DS", b"1\\0\\0\\0\\1\\0"),
            *(element(0x28, number, b"US", struct.pack("<H", value)) for number, value in shorts),
            *(element(0x28, 4, b"CS", b"MONOCHROME2"), element(0x7FE0, 0x10, b"OW", pixels)),
        ]
    )
