"""Frames of a scene in files, each with a pose: as instant-ngp and nerfstudio list them in a transforms.json, and as
ScanNet's exporter writes them, in the folders color, depth, pose and intrinsic.

Sources: https://docs.nerf.studio/quickstart/data_conventions.html; https://github.com/ScanNet/ScanNet, SensReader.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from lightspan.core.errors import one_line
from lightspan.core.files.foreign import settings_object, whole_text
from lightspan.core.files.places import PathUse

TRANSFORMS = "transforms.json"
EXPORTED = ("color", "depth", "pose", "intrinsic")
"""The folders of a scene as ScanNet's exporter writes it."""
PICTURES = (".jpg", ".png")
Lens = Callable[[int, int], np.ndarray]
"""The intrinsics, float32 [3 3], of a picture of this height and width, whose pixels' middles lie at whole numbers."""


class FrameFiles(NamedTuple):
    """One frame of a scene.

    name: for messages.
    picture: its file. depth: that of its depths, of 16 bits; None without one.
    place: float32 [3]. rotation: float32 [3 3], whose rows are the camera's axes: right, down, ahead.
    lens: of the picture. depth_lens: of the depths.
    """

    name: str
    picture: Annotated[Path, PathUse.READ]
    depth: Annotated[Path, PathUse.READ] | None
    place: np.ndarray
    rotation: np.ndarray
    lens: Lens
    depth_lens: Lens


def frames_in(folder: Path) -> list[FrameFiles]:
    """The frames of a scene, in the order of the file, or of their numbers. Exported frames whose pose is not finite,
    as where tracking was lost, are left out. Lenses are taken to be without distortion.

    Raises: ValueError for a folder of neither kind, for files that do not say what they should, and for pictures
        outside of the folder.
    """
    if (folder / TRANSFORMS).is_file():
        return _listed(folder)
    if all((folder / part).is_dir() for part in EXPORTED):
        return _exported(folder)
    raise ValueError(f"it has neither a {TRANSFORMS} nor the folders {', '.join(EXPORTED)}")


def _listed(folder: Path) -> list[FrameFiles]:
    said = settings_object(folder / TRANSFORMS)
    frames = said.get("frames")
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise ValueError(f"its {TRANSFORMS} has no frames; it needs one for each view")
    return [_listed_frame(folder, said | frame) for frame in frames]


def _listed_frame(folder: Path, said: Mapping[str, Any]) -> FrameFiles:
    """`transform_matrix` leads from the camera's axes (right, up, back) to the scene's."""
    name = str(said.get("file_path"))
    picture = _inside(folder, name if Path(name).suffix else f"{name}.png")
    depth = said.get("depth_file_path")
    try:
        pose = np.array(said["transform_matrix"], np.float32)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the frame {one_line(name)} has no transform_matrix of numbers") from error
    if pose.shape not in ((4, 4), (3, 4)) or not np.isfinite(pose).all():
        raise ValueError(f"the transform_matrix of the frame {one_line(name)} is not 4 x 4 finite numbers")
    rotation = pose[:3, :3].T * np.array([[1], [-1], [-1]], np.float32)
    lens = partial(_lens, dict(said))
    return FrameFiles(
        name, picture, None if depth is None else _inside(folder, str(depth)), pose[:3, 3], rotation, lens, lens
    )


def _inside(folder: Path, name: str) -> Path:
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"its frame {one_line(name)} lies outside of {folder}; move it there")
    return folder / name


def _lens(said: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    """Theirs counts from the corner of a picture, half a pixel before the middle of the first pixel, in pixels of
    pictures of `w` and `h`, or of this one.
    """
    try:
        across, down = float(said.get("w", width)), float(said.get("h", height))
        fx = float(said["fl_x"]) if "fl_x" in said else across / 2 / math.tan(float(said["camera_angle_x"]) / 2)
        others = (("fl_y", fx), ("cx", across / 2), ("cy", down / 2))
        fy, cx, cy = (float(said.get(name, other)) for name, other in others)
        x, y = width / across, height / down
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError("its lens needs fl_x, or camera_angle_x, as numbers above 0") from error
    return _checked(np.array([[x * fx, 0, x * cx - 0.5], [0, y * fy, y * cy - 0.5], [0, 0, 1]], np.float32))


def _checked(lens: np.ndarray) -> np.ndarray:
    if not np.isfinite(lens).all() or lens[0, 0] <= 0 or lens[1, 1] <= 0:
        raise ValueError(f"its lens has focal lengths {lens[0, 0]:g} and {lens[1, 1]:g}, which must be above 0")
    return lens


def _exported(folder: Path) -> list[FrameFiles]:
    """`pose` leads from the camera's axes (right, down, ahead) to the scene's."""
    lens, depth_lens = (
        partial(_constant, _checked(_matrix(folder / "intrinsic" / f"intrinsic_{which}.txt")[:3, :3]))
        for which in ("color", "depth")
    )
    pictures = {file.stem: file for file in sorted((folder / "color").iterdir()) if file.suffix.lower() in PICTURES}
    found = []
    for name in sorted(pictures, key=lambda stem: (len(stem), stem)):
        pose = _matrix(folder / "pose" / f"{name}.txt")
        if np.isfinite(pose).all():
            depth = folder / "depth" / f"{name}.png"
            found.append(FrameFiles(name, pictures[name], depth, pose[:3, 3], pose[:3, :3].T, lens, depth_lens))
    return found


def _constant(lens: np.ndarray, height: int, width: int) -> np.ndarray:
    return lens


def _matrix(path: Path) -> np.ndarray:
    """float32 [4 4]."""
    try:
        numbers = np.array(whole_text(path).split(), np.float32)
    except OSError as error:
        raise ValueError(f"its {path.parent.name}/{path.name} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"its {path.parent.name}/{path.name} has something other than numbers") from error
    if numbers.shape != (16,):
        raise ValueError(f"its {path.parent.name}/{path.name} has {numbers.size} numbers, and a pose or a lens has 16")
    return numbers.reshape(4, 4)
