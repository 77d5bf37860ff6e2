"""Batches of volumes, such as computed tomograms.

D ascends from the feet to the head, H from the back to the front, and W from the patient's left to the right (RAS+, its
axes in reverse).
Shapes: B samples, C channels, D slices, H W pixels of a slice, V crops, of which K are base crops and M at random
places, P parameters of an augmentation, N slices as images and v views of each.
"""

from typing import Annotated, NamedTuple, NotRequired, TypedDict

from torch import Tensor

from lightspan.core.batches import Field, Index, Label

Spacing = Annotated[Tensor, Field("float32", "B 3")]
"""Between voxels along D, H and W, in mm, above 0."""
Present = Annotated[Tensor, Field("bool", "B C")]
"""Which channels a sample has; those that it lacks are 0."""
Seed = Annotated[Tensor, Field("int64", "B")]


class VolumeBatch(TypedDict):
    """One volume per sample, or one crop of it.

    segmentation: a class for each voxel, or -1 where it has none.
    inside: whether a voxel lies in the volume, and does not pad it.
    corner: of the crop, its first voxel in its volume; negative where the crop is larger.
    drawn, seed: until the batch is on its device, the bits of `parameters`, and the seed of elastic displacements.
    parameters: how the crop was augmented, see `lightspan.datamodules.volume.augment.Alteration`.
    """

    volume: Annotated[Tensor, Field("float32", "B C D H W", read=True)]
    spacing: Spacing
    present: NotRequired[Present]
    segmentation: NotRequired[Annotated[Tensor, Field("int64", "B D H W")]]
    inside: NotRequired[Annotated[Tensor, Field("bool", "B D H W")]]
    corner: NotRequired[Annotated[Tensor, Field("int64", "B 3")]]
    drawn: NotRequired[Annotated[Tensor, Field("int32", "B 1 P")]]
    seed: NotRequired[Seed]
    parameters: NotRequired[Annotated[Tensor, Field("float32", "B 1 P")]]
    label: Label
    index: Index


class VolumeViewsBatch(TypedDict):
    """Several crops of each volume; row i of every crop comes from the same one.

    corner, drawn, seed, parameters: as in `VolumeBatch`, of each crop.
    overlap: where the first K views are base crops, on a grid: the share of each of the other M that lies in each of
        these, in [0, 1].
    slices: some slices of the first crop, before it is augmented, as images with random views.
    """

    views: Annotated[list[Tensor], Field("float32", "V B C d h w", read=True, of="volume")]
    spacing: Spacing
    present: NotRequired[Present]
    corner: Annotated[Tensor, Field("int64", "B V 3")]
    overlap: NotRequired[Annotated[Tensor, Field("float32", "B M K")]]
    slices: NotRequired[Annotated[list[Tensor], Field("float32", "v B N C h w")]]
    drawn: NotRequired[Annotated[Tensor, Field("int32", "B V P")]]
    seed: NotRequired[Seed]
    parameters: NotRequired[Annotated[Tensor, Field("float32", "B V P")]]
    label: Label
    index: Index


class CameraViews(NamedTuple):
    """Views of one scene, all of one size.

    images: float32 [V 3 H W], in [0, 1].
    place: float32 [V 3]. rotation: float32 [V 3 3], whose rows are the camera's axes: right, down, ahead.
    intrinsics: float32 [V 3 3], in pixels, whose middles lie at whole numbers.
    """

    images: Tensor
    place: Tensor
    rotation: Tensor
    intrinsics: Tensor
