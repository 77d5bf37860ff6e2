"""Cameras with a place and a direction: what they see, and the rays through their pixels.

A pixel's middle lies at whole numbers.
Shapes: V views, H W picture, N rays of a view.
"""

from typing import NamedTuple

import numpy as np


class PosedFrames(NamedTuple):
    """What cameras see of one scene.

    pictures: float32 [V, 3, H, W], in [0, 1].
    depth: float32 [V, H, W], length of the ray in metres, 0 where it is missing.
    normal: float32 [V, 3, H, W], of length 1, towards the camera, or 0 where it is not known.
    classes: int64 [V, H, W]; None where nobody has named them.
    place: float32 [V, 3]; rotation: float32 [V, 3, 3], whose rows are the camera's axes: right, down, ahead.
    intrinsics: float32 [3, 3], of all cameras, or [V, 3, 3].
    """

    pictures: np.ndarray
    depth: np.ndarray
    normal: np.ndarray
    classes: np.ndarray | None
    place: np.ndarray
    rotation: np.ndarray
    intrinsics: np.ndarray


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., 3], none of them 0, with length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def pixel_rays(lens: np.ndarray, height: int, width: int) -> np.ndarray:
    """Through the middles of all pixels as the camera sees them, float64 [N, 3] of length 1."""
    (fx, _, cx), (_, fy, cy), _ = lens.astype(float)
    v, u = np.mgrid[:height, :width].astype(float)
    return unit(np.stack([(u - cx) / fx, (v - cy) / fy, np.ones_like(u)], axis=-1).reshape(-1, 3))
