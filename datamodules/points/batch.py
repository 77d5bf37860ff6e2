"""Batches of point clouds, packed: the points of all samples, one after another.

Shapes: B clouds, N points of all of them together, P parameters of an augmentation.
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
