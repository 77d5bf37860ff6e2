"""Batches of point clouds, packed: the points of all samples, one after another.

Shapes: B clouds, N points of all of them together, P parameters of an augmentation, V views of each, H W pixels,
M points of all next clouds, K boxes of all.
"""

from typing import Annotated, NotRequired, TypedDict

from torch import Tensor

from lightspan.core.batches import Field, Index, Label

Points = Annotated[Tensor, Field("float32", "N 3")]


class PointsBatch(TypedDict):
    """Point clouds of any numbers of points, none included. A sample of a dataset is one cloud, without `offsets`.

    xyz: coordinates, in the unit of the data.
    offsets: cloud i has the points from offsets[i] up to offsets[i + 1].
    colour: red, green and blue in [0, 1].
    normal: of unit length, or 0 where there is none.
    classes: of each point, a class, or -1 where it has none.
    drawn, seed: until the batch is on its device, the bits of `parameters`, and the seed of jitter.
    parameters: how a cloud was augmented, see `lightspan.datamodules.points.augment.Change`.
    """

    xyz: Annotated[Tensor, Field("float32", "N 3", read=True)]
    offsets: Annotated[Tensor, Field("int64", "B+1", read=True, cuts="N")]
    colour: NotRequired[Points]
    normal: NotRequired[Points]
    classes: NotRequired[Annotated[Tensor, Field("int64", "N")]]
    drawn: NotRequired[Annotated[Tensor, Field("int32", "B P")]]
    seed: NotRequired[Annotated[Tensor, Field("int64", "B")]]
    parameters: NotRequired[Annotated[Tensor, Field("float32", "B P")]]
    label: Label
    index: Index


class PosedPointsBatch(PointsBatch):
    """Point clouds, and views of each that cameras with known poses have.

    A point X lies at rotation (X - place) as a camera sees it, and in its picture at what intrinsics make of that. A
    pixel's middle lies at whole numbers. Places and depths are in the unit of `xyz`.

    pictures: red, green and blue in [0, 1].
    depth: length of the ray to what a pixel shows, 0 where it is not known.
    pixel_classes: of what a pixel shows, a class or -1.
    rotation: its rows are a camera's axes: right, down, ahead. Of a scene that is mirrored they are left-handed.
    """

    pictures: Annotated[Tensor, Field("float32", "B V 3 H W")]
    depth: Annotated[Tensor, Field("float32", "B V H W")]
    pixel_classes: NotRequired[Annotated[Tensor, Field("int64", "B V H W")]]
    place: Annotated[Tensor, Field("float32", "B V 3")]
    rotation: Annotated[Tensor, Field("float32", "B V 3 3")]
    intrinsics: Annotated[Tensor, Field("float32", "B V 3 3")]


class SweepsBatch(PointsBatch):
    """Sweeps of a sensor at two moments, both in the axes of the first: its own motion is taken out. z is up.

    flow: from where a point is to where it is at the next moment.
    again: whether the sensor then sees that place; what is hidden, or out of reach, has no partner.
    next_xyz, next_offsets: the sweep of the next moment, packed as the first.
    box: of what stands on the ground at the first moment: x, y and z of the middle, length, width, height, and the yaw
        from x to y in radians.
    box_offsets: by which boxes are cut. box_class: as of points. box_shift: of the middle, up to the next moment.
    """

    flow: Points
    again: Annotated[Tensor, Field("bool", "N")]
    next_xyz: Annotated[Tensor, Field("float32", "M 3")]
    next_offsets: Annotated[Tensor, Field("int64", "B+1", cuts="M")]
    box: NotRequired[Annotated[Tensor, Field("float32", "K 7")]]
    box_offsets: NotRequired[Annotated[Tensor, Field("int64", "B+1", cuts="K")]]
    box_class: NotRequired[Annotated[Tensor, Field("int64", "K")]]
    box_shift: NotRequired[Annotated[Tensor, Field("float32", "K 3")]]
