"""Folders of small files of points and surfaces, for tests. Those of LDraw need no package."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest

CUBE = np.array([[x, y, z] for x in (0.0, 1) for y in (0.0, 1) for z in (0.0, 1)])
QUADS = ((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5))


def brick(path: Path, colour: int = 4, sides: tuple[float, float, float] = (1, 1, 1)) -> Path:
    """A box as an LDraw file, one corner of which is the origin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(map(str, (4, colour, *(CUBE[list(quad)] * sides).reshape(-1).tolist()))) for quad in QUADS]
    path.write_text("\n".join(["0 Box", "0 BFC CERTIFY CCW", *lines, "2 24 0 0 0 1 1 1", ""]))
    return path


def bricks(folder: Path, count: int) -> Path:
    """Boxes of different lengths."""
    for number in range(count):
        brick(folder / f"b{number}.dat", sides=(1 + number, 1, 1))
    return folder


def write_scans(folder: Path, count: int, points: int = 40) -> Path:
    """Scans with colours, normals and classes 0 to 2, of which every seventh point has none."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        draws = np.random.default_rng(number)
        classes = np.where(np.arange(points + number) % 7, np.arange(points + number) % 3, -1)
        normal = draws.normal(size=(len(classes), 3))
        np.savez(
            folder / f"scan{number}.npz",
            xyz=draws.uniform([6, 16, 26], [14, 24, 34], (len(classes), 3)),
            colour=draws.integers(0, 256, (len(classes), 3)).astype(np.uint8),
            normal=(normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(np.float32),
            classes=classes.astype(np.int16),
        )
    return folder


def ply(points: np.ndarray, normals: np.ndarray | None = None, faces: tuple[tuple[int, ...], ...] = ()) -> bytes:
    names = "xyz" if normals is None else ("x", "y", "z", "nx", "ny", "nz")
    rows = points if normals is None else np.concatenate([points, normals], axis=1)
    told = [f"property double {name}" for name in names]
    told += [f"element face {len(faces)}", "property list uchar int vertex_indices"] if faces else []
    lines = [" ".join(map(repr, row)) for row in rows.tolist()] + [" ".join(map(str, (len(f), *f))) for f in faces]
    return "\n".join(
        ["ply", "format ascii 1.0", f"element vertex {len(points)}", *told, "end_header", *lines, ""]
    ).encode()


def off(corners: np.ndarray, start: str = "OFF\n8 6 0\n") -> str:
    """A box, whose eight corners are in the order of `CUBE`."""
    rows = ["{} {} {}".format(*corner) for corner in corners.tolist()] + [f"4 {' '.join(map(str, q))}" for q in QUADS]
    return start + "\n".join(rows) + "\n"


def las(points: np.ndarray, packed: bool, colour: int | None = None, point_format: int = 2) -> bytes:
    """In millimetres about the first point. colour: of 16 bits."""
    laspy = pytest.importorskip("laspy", reason="the extra `points` is not installed")
    pytest.importorskip("lazrs", reason="the extra `points` is not installed")
    header = laspy.LasHeader(point_format=point_format)
    header.scales, header.offsets = [0.001] * 3, points[0]
    data, file = laspy.LasData(header), io.BytesIO()
    data.x, data.y, data.z = points.T
    if colour is not None:
        data.red = data.green = data.blue = np.full(len(points), colour)
    data.write(file, do_compress=packed)
    return file.getvalue()


def deadly_laz() -> bytes:
    """A scan with which lazrs ends its process: it makes room for a layer of 4 GiB, as the file says, and gets none."""
    content = bytearray(las(CUBE, packed=True, point_format=6))
    (first,) = struct.unpack_from("<I", content, 96)
    struct.pack_into("<I", content, first + 8 + 30 + 4 + 4, 2**32 - 1)  # after a place, a point, a count and a layer
    return bytes(content)
