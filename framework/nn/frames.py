"""A clip as its frames, for parts that read one at a time, and back.

Shapes: B clips, C channels, T frames, H W sides, N = B*T frames of all clips.
"""

from torch import Tensor, nn


def as_frames(clip_BCTHW: Tensor) -> Tensor:
    """[B T C H W] in one row of frames, [B*T C H W]."""
    return clip_BCTHW.transpose(1, 2).flatten(0, 1)


def as_clip(frames_NCHW: Tensor, frames: int) -> Tensor:
    """[B C T H W] of B*T frames, the inverse of `as_frames`.

    Args:
        frames: T, at least 1.
    """
    return frames_NCHW.unflatten(0, (len(frames_NCHW) // frames, frames)).transpose(1, 2)


def by_frame(module: nn.Module, clip_BCTHW: Tensor) -> Tensor:
    """A module for pictures, over the frames of a clip: [B D T h w]."""
    return as_clip(module(as_frames(clip_BCTHW)), clip_BCTHW.shape[2])
