"""Batches of volumes, such as computed tomograms.

Shapes: B samples, C channels, D slices, H W pixels of a slice.
"""

from typing import Annotated, TypedDict

from torch import Tensor

from lightspan.core.batches import Field, Index, Label


class VolumeBatch(TypedDict):
    """One volume per sample.

    spacing: between voxels along D, H and W, in mm, above 0.
    """

    volume: Annotated[Tensor, Field("float32", "B C D H W", read=True)]
    spacing: Annotated[Tensor, Field("float32", "B 3")]
    label: Label
    index: Index
