"""Posed pictures of a scene from a folder.

Shapes: V views, H W pixels.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.foreign import content_of
from lightspan.core.ranges import require_in
from lightspan.datamodules.loading.frame_files import frames_in
from lightspan.datamodules.shards.decoders import decode_image
from lightspan.datamodules.shards.headers import UNDECODABLE
from lightspan.datamodules.volume.batch import CameraViews


def views_in(folder: str | Path, reduced: int = 1) -> CameraViews:
    """The views of a folder that `lightspan.datamodules.loading.frame_files.frames_in` reads, such as one with a
    transforms.json of nerfstudio.

    Args:
        reduced: by which factor pictures are made smaller, at least 1.
    Raises: UserError for a folder or pictures that cannot be read, or of several sizes, and for pictures outside of the
        folder.
    """
    require_in("[1, inf)", reduced=reduced)
    folder = Path(folder)
    try:
        frames = frames_in(folder)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder}: {error}") from error
    images, lenses = [], []
    for frame in frames:
        try:
            image = decode_image(content_of(frame.picture)).float() / 255
            lens = torch.from_numpy(frame.lens(*image.shape[1:]).copy())
        except UNDECODABLE as error:
            raise UserError(f"{folder}: the frame {one_line(frame.name)} cannot be read: {error}") from error
        images.append(F.avg_pool2d(image, reduced))
        # The middle of the first of the smaller pixels lies at (reduced - 1) / 2 of the larger ones.
        lens[:2, 2] = lens[:2, 2] - (reduced - 1) / 2
        lens[:2] = lens[:2] / reduced
        lenses.append(lens)
    if len({image.shape for image in images}) > 1:
        raise UserError(f"{folder}: pictures are of several sizes; bring them to one")
    if not frames:
        raise UserError(f"{folder} has no frame with a pose")
    place_V3, rotation_V33 = (
        torch.from_numpy(np.stack([getattr(frame, name) for frame in frames])) for name in ("place", "rotation")
    )
    return CameraViews(torch.stack(images), place_V3, rotation_V33, torch.stack(lenses))
