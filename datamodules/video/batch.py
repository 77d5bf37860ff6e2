"""Batches of video.

Shapes: B clips, C channels, T frames, H W pixels.
"""

from typing import Annotated, TypedDict

from torch import Tensor

from lightspan.core.batches import Field, Index, Label


class ClipBatch(TypedDict):
    """Clips of one length, standardised per channel.

    fps: frames in a second, above 0.
    """

    clip: Annotated[Tensor, Field("float32", "B C T H W", read=True)]
    fps: Annotated[Tensor, Field("float32", "B")]
    label: Label
    index: Index
