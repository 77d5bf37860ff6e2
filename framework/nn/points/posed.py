"""Reads the posed views of a batch of scenes.

Shapes: B scenes, V views of each, H W pixels.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lightspan.core.errors import UserError


class SceneViews(NamedTuple):
    """See `lightspan.datamodules.points.batch.PosedPointsBatch`."""

    pictures_BV3HW: Tensor
    depth_BVHW: Tensor
    place_BV3: Tensor
    rotation_BV33: Tensor
    intrinsics_BV33: Tensor


def posed_views_of(batch: Mapping[str, Any], scenes: int, method: str) -> SceneViews:
    """The views of a batch.

    Args:
        scenes: B.
        method: its name, for messages.
    Raises: UserError for a part that is missing, or does not fit the others.
    """
    found = [batch.get(name) for name in ("pictures", "depth", "place", "rotation", "intrinsics")]
    shapes = [[*x.shape] if isinstance(x, Tensor) and x.is_floating_point() else None for x in found]
    pictures = shapes[0]
    if pictures is not None and len(pictures) == 5 and pictures[0] == scenes and pictures[2] == 3:
        B, V, _, H, W = pictures
        if shapes[1:] == [[B, V, H, W], [B, V, 3], [B, V, 3, 3], [B, V, 3, 3]] and V * H * W:
            return SceneViews(*found)  # type: ignore[arg-type]
    raise UserError(
        f"{method} renders posed views, pictures [{scenes}, V, 3, H, W] with depth, place, rotation and intrinsics, "
        f"and this batch has floats of {shapes}; take data whose batches are a PosedPointsBatch, such as "
        "lightspan.datamodules.points.rgbd.RGBDFolder"
    )
