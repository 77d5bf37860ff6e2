"""Volumes of NIfTI files and DICOM series, in one orientation. Without torch.

Axes are D H W: D ascends from the feet to the head (superior), H from the back to the front (anterior), W from the
patient's left to the right, which is NIfTI's RAS+ with its axes in reverse. A scan that is tilted is read along the
nearest of these axes, and keeps its tilt in the affine map.
Shapes: D slices, H W pixels of a slice.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lightspan.core.files.foreign import NUMBERS, content_of, opened_regular, unpacked
from lightspan.datamodules.volume import dicom
from lightspan.datamodules.volume.elements import StoredPixels

T = TypeVar("T")

NIFTI, DICOM = (".nii", ".nii.gz"), (".dcm", ".dicom", ".ima")
_MILLIMETRES = {"meter": 1000.0, "micron": 0.001}
_HEADERS = {348: 1, 540: 2}  # bytes of a header -> version of NIfTI
_AFTER = 2**20  # bytes that may follow the voxels
_FARTHEST = 1e12  # mm from the origin, and between voxels; squares of numbers that are far larger overflow
_UNEVEN = 0.05  # of the distance between slices


class VoxelGrid(NamedTuple):
    """Sides in voxels (D, H, W), and the map of (d, h, w, 1) to millimetres (right, anterior, superior, 1), [4, 4]."""

    shape: tuple[int, ...]
    affine: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """Between voxels along D, H and W, in mm, float64 [3]."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def agrees(self, other: "VoxelGrid") -> bool:
        """Whether each voxel is where the other grid has it, to half a voxel."""
        if self.shape != other.shape:
            return False
        corners = np.array([[*map(float, at), 1.0] for at in np.ndindex(2, 2, 2)]) * [*(n - 1 for n in self.shape), 1]
        apart = np.linalg.norm((corners @ (self.affine - other.affine).T)[:, :3], axis=1)
        return bool(apart.max() <= self.spacing.min() / 2)


@dataclass(frozen=True)
class VolumeFile:
    """A NIfTI file, or the slices of a DICOM series in one folder.

    Attributes:
        name: of the file, or of the series' folder, relative to the folder of all.
        slices: file names of a series; empty of a NIfTI file.
    """

    name: str
    slices: tuple[str, ...] = ()

    def paths(self, folder: Path) -> list[Path]:
        return [folder / self.name / one for one in self.slices] or [folder / self.name]

    def grid(self, folder: Path) -> VoxelGrid:
        """Of headers alone. Raises: as `read`, as far as headers tell."""
        return self._opened(folder)[0]

    def read(self, folder: Path) -> tuple[np.ndarray, VoxelGrid]:
        """float32 [D H W] in the file's unit, Hounsfield for CT, NaN where the file has it; and where the voxels are.

        Raises: ValueError for damage, more voxels than the limit of `NUMBERS` (before any is read), four axes, colours,
            complex numbers, and slices of several series, uneven or of several sizes; UserError without the extra.
        """
        grid, values = self._opened(folder)
        return values(), grid

    def _opened(self, folder: Path) -> tuple[VoxelGrid, Any]:
        paths = self.paths(folder)
        if self.slices:
            return _opened_series(paths)
        return _opened_nifti(paths[0])


def _nibabel() -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise dicom.without("nibabel") from error
    return nibabel


def _turned(shape_xyz: tuple[int, ...], affine_xyz: np.ndarray) -> tuple[VoxelGrid, Any]:
    """The grid of a volume [x y z] with this map to RAS millimetres, and what turns its values to [D H W].

    Raises: ValueError for a map that loses an axis.
    """
    orientations = _nibabel().orientations
    sane = bool((np.abs(affine_xyz) < _FARTHEST).all())  # NaN is not, either
    turns = orientations.io_orientation(affine_xyz) if sane else np.full((3, 2), np.nan)
    if not np.isfinite(turns).all() or abs(np.linalg.det(affine_xyz[:3, :3])) < 1e-9:
        raise ValueError("its header does not tell where its axes point; save it with an orientation")
    affine = affine_xyz @ orientations.inv_ornt_aff(turns, shape_xyz)
    order = np.argsort(turns[:, 0])  # of the file's axes, by the axis that each becomes
    grid = VoxelGrid(tuple(int(shape_xyz[axis]) for axis in order[::-1]), affine[:, [2, 1, 0, 3]])
    return grid, lambda values: orientations.apply_orientation(values, turns).transpose(2, 1, 0)


def _opened_nifti(path: Path) -> tuple[VoxelGrid, Any]:
    nib = _nibabel()
    damage = (nib.spatialimages.HeaderDataError, nib.wrapstruct.WrapStructError, OverflowError, TypeError, KeyError)
    start = _first_bytes(path, max(_HEADERS))
    try:
        header = _header(nib, start)
        shape = tuple(int(side) for side in header.get_data_shape())
        dtype, (slope, offset) = header.get_data_dtype(), header.get_slope_inter()
        unit, at = header.get_xyzt_units()[0], float(header["vox_offset"])
    except damage as error:
        raise ValueError(f"its NIfTI header is damaged: {error}") from error
    affine = _affine(header)
    with np.errstate(over="ignore"):
        affine[:3] *= _MILLIMETRES.get(unit, 1.0)
    shape = _three_axes(shape)
    NUMBERS.require(math.prod(shape))
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        kind = "colours" if dtype.names else "complex numbers" if dtype.kind == "c" else str(dtype)
        raise ValueError(f"its voxels are {kind}, not single numbers; save one channel")
    grid, turn = _turned(shape, affine)

    def values() -> np.ndarray:
        count, first = math.prod(shape), int(at) if math.isfinite(at) else -1
        end = first + count * dtype.itemsize
        content = unpacked(content_of(path), max(0, end) + _AFTER)
        if first < 0 or end > len(content):
            raise ValueError(f"it is cut short: {len(content):,} bytes are too few for {' x '.join(map(str, shape))}")
        stored = np.frombuffer(content, dtype, count, first).reshape(shape, order="F")
        scale, shift = 1.0 if slope is None else slope, 0.0 if offset is None else offset
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is dealt with later
            stored = stored.astype(np.float32)
            if (scale, shift) != (1, 0):
                stored = stored * np.float32(scale) + np.float32(shift)
        return turn(stored)

    return grid, values


def _header(nib: Any, start: bytes) -> Any:
    """Of NIfTI 1 or 2. Extensions, which may be of any kind, are not read."""
    size = next((int.from_bytes(start[:4], order) for order in ("little", "big")
                 if int.from_bytes(start[:4], order) in _HEADERS), 0)  # fmt: skip
    if not size or len(start) < size:
        raise ValueError("it is not a NIfTI file" if start else "it is empty")
    kind = nib.Nifti1Header if _HEADERS[size] == 1 else nib.Nifti2Header
    header = kind(binaryblock=start[:size], check=False)
    if bytes(header["magic"].tobytes())[:2] != b"n+":
        raise ValueError("its voxels are not in this file; save header and voxels as one .nii file")
    return header


def _affine(header: Any) -> np.ndarray:
    """Of (x, y, z, 1) to the file's unit, float64 [4 4]. Raises: ValueError for a rotation that is none, or whose
    handedness is neither 1 nor -1.
    """
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1  # as the standard reads it
    try:
        return np.array(header.get_best_affine(), float)
    except (ValueError, _nibabel().spatialimages.HeaderDataError) as error:
        raise ValueError(f"its NIfTI header is damaged: {error}") from error


def _first_bytes(path: Path, count: int) -> bytes:
    with opened_regular(path) as file:
        start = file.read(2**16)
    if start[:2] != b"\x1f\x8b":
        return start[:count]
    try:
        return zlib.decompressobj(wbits=47).decompress(start, count)
    except zlib.error as error:
        raise ValueError(f"it cannot be unpacked: {error}") from error


def _three_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """With one slice for a picture, and without further axes of length 1. Raises: ValueError for others."""
    three = (*shape[:3], *[1] * (3 - len(shape)))
    if not shape or min(shape) < 1:
        raise ValueError(f"it has sides {list(shape)} and so no voxel")
    if math.prod(shape[3:]) > 1:
        raise ValueError(
            f"it has {len(shape)} axes, {' x '.join(map(str, shape))}: several volumes; save each in a file of its own"
        )
    return three


class _Slice(NamedTuple):
    path: Path
    series: str
    size: tuple[int, ...]  # x y and, in a file of several frames, z
    origin: np.ndarray
    direction: np.ndarray
    spacing: tuple[float, ...]


def _opened_series(paths: list[Path]) -> tuple[VoxelGrid, Any]:
    slices = [_slice(path) for path in paths]
    first = slices[0]
    if len(count := {one.series for one in slices}) > 1:
        raise ValueError(f"it holds slices of {len(count)} series; put each series into a folder of its own")
    if any(one.size != first.size or not np.allclose(one.direction, first.direction, atol=1e-3) for one in slices):
        raise ValueError("its slices are of several sizes or directions; keep those of one volume")
    if len(slices) > 1 and first.size[2] > 1:
        raise ValueError(f"it holds {len(slices)} files of several slices each; put each into a folder of its own")
    heights = np.array([float(one.origin @ one.direction[:, 2]) for one in slices])
    order, apart = np.argsort(heights, kind="stable"), first.spacing[2]
    if len(slices) > 1:
        steps = np.diff(heights[order])
        apart = float(np.median(steps))
        if steps.min() < 1e-4:
            raise ValueError("it holds two slices of one place, as of several times; keep one volume in a folder")
        if np.abs(steps - apart).max() > _UNEVEN * apart:
            raise ValueError(
                f"its slices are {steps.min():.3g} to {steps.max():.3g} mm apart, so that some are missing; add them"
            )
    sides = (*first.size[:2], max(len(slices), first.size[2]))
    NUMBERS.require(math.prod(sides))
    affine = np.eye(4)
    affine[:3, :3] = first.direction * [*first.spacing[:2], apart]
    affine[:3, 3] = slices[order[0]].origin
    grid, turn = _turned(sides, np.diag([-1.0, -1, 1, 1]) @ affine)  # DICOM counts towards left and posterior

    def values() -> np.ndarray:
        parts = [_of(slices[at].path, dicom.voxels) for at in order]
        whole_zyx = np.concatenate([part.reshape(-1, *part.shape[-2:]) for part in parts]).astype(np.float32)
        return turn(whole_zyx.transpose(2, 1, 0))

    return grid, values


def _of(path: Path, read: Callable[[Path], T]) -> T:
    """Raises: ValueError, with the file's name."""
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _slice(path: Path) -> _Slice:
    return _of(path, _read_slice)


def _read_slice(path: Path) -> _Slice:
    pixels = StoredPixels.of(content_of(path))
    try:
        told = dicom.header(path)
    except ValueError as error:
        raise ValueError(f"it is not a DICOM image, or is damaged: {error}") from error
    if told["components"] != 1:
        raise ValueError(f"it has {told['components']} colours a voxel, not single numbers")
    # The decoder makes up the rest of pixels that are cut short, from whatever was in memory.
    pixels.require(math.prod(told["size"]), int(told.get("bits", "8")))
    size, spacing = (*told["size"], 1, 1)[:3], (*told["spacing"], 1.0)[:3]
    direction = np.array(told["direction"], float)
    direction = direction.reshape(3, 3) if direction.size == 9 else np.eye(3)
    origin = np.array((*told["origin"], 0.0)[:3], float)
    return _Slice(path, told.get("series", "").strip(), tuple(map(int, size)), origin, direction, spacing)
