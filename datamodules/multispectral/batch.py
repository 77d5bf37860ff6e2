"""Batches of pictures from satellites.

Shapes: B samples, C bands, T dates, H W pixels, V views, G tags.
"""

from typing import Annotated, TypedDict

from torch import Tensor

from lightspan.core.batches import Field, Index, Label
from lightspan.datamodules.image.batch import Image, Images, Tags


class MultispectralBatch(TypedDict):
    """Pictures of any number of bands, as satellites take them.

    image: reflectance standardised per band to about zero mean and unit variance; 0, a band's mean, where a pixel is
        not valid.
    valid: 0 where a band was not seen there: nodata, a cloud, a band that is absent. A method takes nothing from such a
        pixel to learn from.
    label: 0 where nothing is known.
    """

    image: Image
    valid: Annotated[Tensor, Field("int64", "B C H W")]
    label: Label
    index: Index


class MultispectralSeriesBatch(TypedDict):
    """Pictures of one place at several dates: image and valid as in `MultispectralBatch`."""

    image: Annotated[Tensor, Field("float32", "B C T H W", read=True)]
    valid: Annotated[Tensor, Field("int64", "B C T H W")]
    label: Label
    index: Index


class SeasonsBatch(TypedDict):
    """Places in two seasons each, with tags: a `TaggedViewsBatch` of any bands, whose views are crops of either season.

    views: V is 2.
    tags: 1 for each tag that holds.
    tags_known: 0 where it is not known whether a tag holds.
    """

    views: Images
    tags: Tags
    tags_known: Tags
    index: Index
