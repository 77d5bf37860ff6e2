"""Posed pictures of a scene from a folder, as instant-ngp and nerfstudio have it.

Shapes: V views, H W pixels.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.foreign import content_of, settings_object
from lightspan.core.ranges import require_in
from lightspan.datamodules.shards.decoders import decode_image
from lightspan.datamodules.shards.headers import UNDECODABLE
from lightspan.datamodules.volume.batch import CameraViews

TRANSFORMS = "transforms.json"


def views_in(folder: str | Path, reduced: int = 1) -> CameraViews:
    """The views of a folder with a transforms.json, as instant-ngp and nerfstudio read it: `frames` with `file_path`
    and `transform_matrix`, from the camera's axes (right, up, back) to the scene's, and `fl_x`, `fl_y`, `cx`, `cy`, or
    `camera_angle_x`, of all frames or of each. Lenses are taken to be without distortion.

    Args:
        reduced: by which factor pictures are made smaller, at least 1.
    Raises: UserError for a folder or pictures that cannot be read, or of several sizes, and for pictures outside of the
        folder.
    """
    require_in("[1, inf)", reduced=reduced)
    folder = Path(folder)
    try:
        said = settings_object(folder / TRANSFORMS)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / TRANSFORMS}: {error}") from error
    frames = said.get("frames")
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise UserError(f"{folder / TRANSFORMS} has no frames; it needs one for each view")
    images, poses, lenses = [], [], []
    for frame in frames:
        name = str(frame.get("file_path"))
        file = folder / name if Path(name).suffix else folder / f"{name}.png"
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{folder / TRANSFORMS}: the frame {one_line(name)} lies outside of {folder}; move it there"
            )
        try:
            image = decode_image(content_of(file)).float() / 255
            pose = np.array(frame["transform_matrix"], np.float32)
            lens = _lens(said | frame, *image.shape[1:])
            if pose.shape != (4, 4) or not np.isfinite(pose).all():
                raise ValueError("its transform_matrix is not 4 x 4 numbers")
        except (*UNDECODABLE, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / TRANSFORMS}: the frame {name} cannot be read: {error}") from error
        images.append(F.avg_pool2d(image, reduced))
        poses.append(pose)
        # The middle of the first of the smaller pixels lies at (reduced - 1) / 2 of the larger ones.
        lens[:2, 2] = lens[:2, 2] - (reduced - 1) / 2
        lens[:2] = lens[:2] / reduced
        lenses.append(lens)
    if len({image.shape for image in images}) > 1:
        raise UserError(f"{folder / TRANSFORMS}: pictures are of several sizes; bring them to one")
    pose_V44 = torch.from_numpy(np.stack(poses))
    rotation_V33 = pose_V44[:, :3, :3].mT * torch.tensor([1.0, -1.0, -1.0])[:, None]
    return CameraViews(torch.stack(images), pose_V44[:, :3, 3], rotation_V33, torch.stack(lenses))


def _lens(said: dict[str, Any], height: int, width: int) -> Tensor:
    """float32 [3 3]. Theirs counts from the corner of a picture, half a pixel before the middle of the first pixel."""
    fx = float(said["fl_x"]) if "fl_x" in said else width / 2 / math.tan(float(said["camera_angle_x"]) / 2)
    fy, cx, cy = (float(said.get(name, other)) for name, other in (("fl_y", fx), ("cx", width / 2), ("cy", height / 2)))
    return torch.tensor([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1]], dtype=torch.float32)
