"""Points and surfaces of PLY, OBJ, STL, OFF, LAS, LAZ and LDraw files. Without torch.

Shapes: N points, V vertices, F triangles.
"""

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.files.foreign import NUMBERS, TRIANGLES, bounded_memory, bounded_time, content_of
from lightspan.datamodules.image.picture_files import Kind
from lightspan.datamodules.points.ldraw import LDrawFiles
from lightspan.datamodules.points.scans import scan, without
from lightspan.datamodules.points.shapes import Shape, shape_of

SCANS, BRICKS, MESHES = (".las", ".laz"), (".dat", ".ldr"), (".ply", ".obj", ".stl", ".off")
POINTS = Kind("cloud", "PLY, OBJ, STL, OFF, LAS, LAZ or LDraw (.dat, .ldr)", (*MESHES, *SCANS, *BRICKS))


def read_shape(path: Path, bricks: LDrawFiles) -> Shape:
    """The points of a file, or its surface if it has faces; vertices that belong to none are left out then.

    Args:
        bricks: where LDraw files find others.
    Raises: ValueError for damage, nothing to see, and more than the limits; UserError without the extra `points`.
    """
    ending = path.suffix.lower()
    if ending in BRICKS:
        corners, colours = bricks.triangles(path)
        if not len(corners):
            raise ValueError("it has no triangle, neither its own nor of files that it names")
        return shape_of(corners, np.repeat(colours[:, None], 3, axis=1))
    return scan(path) if ending in SCANS else _mesh(path, ending[1:])


@contextmanager
def as_damage() -> Iterator[None]:
    """For readers of others, which raise all kinds of things for files that are not as they should be, and say more
    than is of use. A file may take as much memory and time as `lightspan.core.files.foreign` allows.

    Raises: ValueError for any of them; UserError as it is.
    """
    logger = logging.getLogger("trimesh")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)
        with bounded_memory(), bounded_time(), np.errstate(all="ignore"):
            yield
    except UserError:
        raise
    except Exception as error:
        said = str(error) or type(error).__name__
        raise ValueError(said if said.startswith("it ") else f"it is damaged: {said}") from error
    finally:
        logger.setLevel(level)


def meshes_in(content: bytes, kind: str, beside: Any = None) -> list[Any]:
    """The meshes and clouds of a file as trimesh has them. Call it inside of `as_damage`.

    Args:
        kind: such as "obj".
        beside: gives the bytes of materials and pictures by their names; without, a file that names others is read
            without them.
    Raises: UserError without the extra `points`.
    """
    try:
        import trimesh
    except ImportError as error:
        raise without("trimesh") from error
    # Bytes, not a path: what a file names elsewhere is not looked for.
    try:
        loaded: Any = trimesh.load(io.BytesIO(content), file_type=kind, process=False, resolver=beside)
    except IndexError as error:
        if kind != "obj":  # only of OBJ files trimesh looks up the vertices of faces
            raise
        raise ValueError("it has a face of a vertex that is not there") from error
    return list(loaded.geometry.values()) if isinstance(loaded, trimesh.Scene) else [loaded]


def _mesh(path: Path, kind: str) -> Shape:
    content = content_of(path)
    vertices, faces = 0, 0
    if kind == "ply":
        vertices, faces = _told(content)
    elif kind == "off":
        content, vertices, faces = _of_off(content)
    with as_damage():
        found = meshes_in(content, kind)
        found = [one for one in found if len(getattr(one, "vertices", ()))]
        surfaces = [one for one in found if len(getattr(one, "faces", ()))]
        if sum(len(one.vertices) for one in found) < vertices or sum(len(one.faces) for one in surfaces) < faces:
            raise ValueError(f"it is cut short: its header announces {vertices:,} points and {faces:,} faces")
        if not found:
            raise ValueError(f"it has no point, or is no {kind.upper()} file")
        return _surface(surfaces) if surfaces else _points(found)


def _told(content: bytes) -> tuple[int, int]:
    """The points and faces that a PLY file's header announces.

    Raises: ValueError for no header, and for fewer lines of text than it announces, for which readers make up for
        themselves; TooMuchError beyond the limits.
    """
    header, end, _ = content[: 2**16].partition(b"end_header")
    if not (header.startswith(b"ply") and end):
        raise ValueError("it is no PLY file" if content else "it is empty")
    counts = {name: int(count) for name, count in re.findall(rb"element\s+(\w+)\s+(\d{1,18})\s", header)}
    vertices, faces = (counts.get(name, 0) for name in (b"vertex", b"face"))
    NUMBERS.require(3 * vertices)
    TRIANGLES.require(faces)
    lines = content[len(header) :].rstrip().count(b"\n") if re.search(rb"format\s+ascii", header) else None
    if lines is not None and lines < sum(counts.values()):
        raise ValueError(f"it is cut short: its header announces {vertices:,} points and {faces:,} faces")
    return vertices, faces


def _of_off(content: bytes) -> tuple[bytes, int, int]:
    """An OFF file whose counts follow on a line of their own, as readers want them and many of ModelNet40 lack, and
    the points and faces that it announces.

    Raises: ValueError for no such file, and for fewer lines than it announces; TooMuchError beyond the limits.
    """
    lines = [line for line in content.splitlines() if line.strip() and not line.lstrip().startswith(b"#")]
    found = re.match(rb"\s*(C?OFF)\s*(.*)", lines[0], re.IGNORECASE) if lines else None
    if found is None:
        raise ValueError("it is no OFF file" if content else "it is empty")
    counts, rest = (found[2], lines[1:]) if found[2].strip() else (b"".join(lines[1:2]), lines[2:])
    told = re.match(rb"\s*(\d{1,18})\s+(\d{1,18})(\s|$)", counts)
    if told is None:
        raise ValueError("it is damaged: its header does not tell how many points and faces it has")
    vertices, faces = int(told[1]), int(told[2])
    NUMBERS.require(3 * vertices)
    TRIANGLES.require(faces)
    if len(rest) < vertices + faces:
        raise ValueError(f"it is cut short: its header announces {vertices:,} points and {faces:,} faces")
    return b"\n".join([found[1].upper(), counts, *rest]), vertices, faces


def _surface(meshes: list[Any]) -> Shape:
    TRIANGLES.require(sum(len(mesh.faces) for mesh in meshes))
    for mesh in meshes:
        if mesh.faces.min() < 0 or mesh.faces.max() >= len(mesh.vertices):
            raise ValueError(f"it has a face of vertex {int(mesh.faces.max()):,}, and {len(mesh.vertices):,} vertices")
    colours = [colour for mesh in meshes if (colour := _corner_colours(mesh)) is not None]
    known = np.concatenate(colours) if len(colours) == len(meshes) else None
    return shape_of(np.concatenate([mesh.vertices[mesh.faces] for mesh in meshes]), known)


def _corner_colours(mesh: Any) -> np.ndarray | None:
    """uint8 [F 3 3], of vertices or faces; None without any, as where a picture holds them."""
    if mesh.visual.kind == "vertex":
        return np.asarray(mesh.visual.vertex_colors)[mesh.faces][..., :3].astype(np.uint8)
    if mesh.visual.kind == "face":
        return np.repeat(np.asarray(mesh.visual.face_colors)[:, None, :3], 3, axis=1).astype(np.uint8)
    return None


def _points(clouds: list[Any]) -> Shape:
    xyz = np.concatenate([np.asarray(cloud.vertices, float) for cloud in clouds])
    colours = [np.asarray(getattr(cloud, "colors", None)) for cloud in clouds]
    coloured = sum(len(one) if one.ndim == 2 else 0 for one in colours) == len(xyz)
    raw = clouds[0].metadata.get("_ply_raw", {}).get("vertex", {}).get("data")
    names = getattr(getattr(raw, "dtype", None), "names", None) or (raw if isinstance(raw, dict) else ())
    has_normals = len(clouds) == 1 and all(name in names for name in ("nx", "ny", "nz"))
    normal = (
        np.stack([np.asarray(raw[name], float).reshape(-1) for name in ("nx", "ny", "nz")], 1) if has_normals else None
    )
    return shape_of(
        xyz,
        np.concatenate(colours)[:, :3].astype(np.uint8) if coloured else None,
        normal if normal is not None and len(normal) == len(xyz) else None,
    )
