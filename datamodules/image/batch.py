"""Batches of pictures.

Shapes: B samples, C H W image, V views, P parameters of a view, K tasks, G tags, T letters.
"""

from typing import Annotated, Generic, NamedTuple, NotRequired, TypedDict, TypeVar

from torch import Tensor

from lightspan.core.batches import Field, Index, Label

T = TypeVar("T")

Image = Annotated[Tensor, Field("float32", "B C H W", read=True)]
"""Standardised per channel to about zero mean and unit variance."""
Images = Annotated[list[Tensor], Field("float32", "V B C h w", read=True, of="image")]
"""Views of each image, standardised as the image; row i of every view comes from the same one."""
Parameters = Annotated[Tensor, Field("float32", "B V P")]
Pixels = Annotated[Tensor, Field("int64", "B H W")]
Tags = Annotated[Tensor, Field("int64", "B G")]


class ImageBatch(TypedDict):
    """One picture per sample, standardised per channel to about zero mean and unit variance."""

    image: Image
    label: Label
    index: Index


class ViewParameters(NamedTuple, Generic[T]):
    """How a view came from its picture, in the order of the steps. In brackets: what leaves the picture as it is.

    top, left, height, width: the crop, as shares of the picture's height and width [0 0 1 1]. What lies outside the
        picture is black.
    angle: degrees, counter-clockwise [0].
    mirrored: 1 if left and right are swapped [0].
    brightness, contrast, saturation: factors [1].
    hue: turns of the colour circle [0].
    grey: 1 if the colours are gone [0].
    blur: standard deviation of a Gaussian, in pixels of the view [0].
    solarised: 1 if what is brighter than half is inverted [0].
    grain: standard deviation of the noise on each pixel, where white is 1 [0].
    """

    top: T
    left: T
    height: T
    width: T
    angle: T
    mirrored: T
    brightness: T
    contrast: T
    saturation: T
    hue: T
    grey: T
    blur: T
    solarised: T
    grain: T


class ViewsBatch(TypedDict):
    """Several views of each picture. Row i of every view comes from the same picture, or from the same scene.

    views: H and W may differ between views.
    parameters: what made each view. `ViewParameters(*batch["parameters"].unbind(2))` names those of
        `lightspan.datamodules.image.augment.views`, each [B, V]; data that know more of their views (a pose, a light)
        have columns of their own. Absent where views are made without them.
    """

    views: Images
    parameters: NotRequired[Parameters]
    label: Label
    index: Index


class DrawnViewsBatch(TypedDict):
    """Pictures whose views are drawn and will be made on the device, where the batch becomes a `ViewsBatch`.

    image: as it is, uint8 or, in [0, 1], float32.
    drawn: the bits of `parameters`.
    seed: of the grain.
    """

    image: Annotated[Tensor, Field("any", "B C H W", read=True)]
    drawn: Annotated[Tensor, Field("int32", "B V P")]
    seed: Annotated[Tensor, Field("int64", "B")]
    label: NotRequired[Label]
    index: Index


class TaggedBatch(TypedDict):
    """Pictures with tags, of which any number may hold of one picture.

    tags: 1 for each tag that holds.
    tags_known: 0 where it is not known whether a tag holds; `tags` is then 0.
    """

    image: Image
    tags: Tags
    tags_known: Tags
    index: Index


class TaggedViewsBatch(TypedDict):
    """Several views of each picture, as in `ViewsBatch`, with the tags of a `TaggedBatch`."""

    views: Images
    parameters: NotRequired[Parameters]
    tags: Tags
    tags_known: Tags
    index: Index


class PairBatch(TypedDict):
    """Two photographs of each scene, of which nothing else is known.

    views: V is 2.
    index: the pair's position in its dataset.
    """

    views: Images
    index: Index


class PlaceBatch(ImageBatch):
    """Pictures and where they were taken.

    place: two coordinates, such as metres to the east and to the north of somewhere.
    query: 1 for a picture whose place is asked for, 0 for one of the database that answers.
    label: the region; pictures of two regions show different places, whatever their coordinates.
    """

    place: Annotated[Tensor, Field("float32", "B 2")]
    query: Annotated[Tensor, Field("int64", "B")]


class PlaceViewsBatch(TypedDict):
    """Pictures that were taken near one another.

    views: the first a query, the second one of the database, V is 2.
    places: of each view, as `place` of a `PlaceBatch`.
    label: the region, as there.
    """

    views: Images
    places: Annotated[Tensor, Field("float32", "B V 2")]
    label: Label
    index: Index


class QuestionBatch(TypedDict):
    """A picture per sample, and what one of several tasks says of it.

    task: which one asks, counted from 0.
    target: its answer, 1 for yes and -1 for no.
    """

    image: Image
    task: Annotated[Tensor, Field("int64", "B")]
    target: Annotated[Tensor, Field("float32", "B")]
    index: Index


class TasksBatch(TypedDict):
    """One picture of each of several tasks a sample, standardised as each task's own.

    image: of the tasks in their order.
    label: each a class of its task. A method that learns without labels leaves it alone.
    index: the sample's number; a task's own sample is that number modulo its size.
    """

    image: Annotated[Tensor, Field("float32", "B K C H W", read=True)]
    label: Annotated[Tensor, Field("int64", "B K")]
    index: Index


class SegmentedBatch(TypedDict):
    """Pictures with the class of each pixel, in [0, num_classes), or -1 where a pixel has none."""

    image: Image
    semantic: Pixels
    index: Index


class DomainsBatch(TypedDict):
    """Two pictures a sample, of different scenes in different styles, each with the class of each pixel.

    image: in the source style, standardised with the moments of that style.
    semantic: each in [0, num_classes), or -1 where a pixel has no class.
    target_image: in the target style, standardised with the source's moments.
    target_semantic: which a method reads to judge itself, not to learn. Absent in training where the target has no
        masks.
    """

    image: Image
    semantic: Pixels
    target_image: Annotated[Tensor, Field("float32", "B C H W")]
    target_semantic: NotRequired[Pixels]
    index: Index


class ReadingBatch(TypedDict):
    """Pictures of words with their letters.

    characters: 1 + the place of a letter in the alphabet, and 0 behind a word's end.
    """

    image: Image
    characters: Annotated[Tensor, Field("int64", "B T")]
    index: Index
