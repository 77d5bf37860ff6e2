"""Batches of rendered samples, which have exact labels.

Shapes: B samples, C H W image, V views, P parameters of a view or tokens of a sentence beside letters, K places for
objects, G tags, T tokens, frames or dates.
"""

from typing import Annotated, NotRequired, TypedDict

from torch import Tensor

from lightspan.core.batches import Field, Index, Label
from lightspan.datamodules.audio.batch import AudioBatch
from lightspan.datamodules.image.batch import Image, Images, Parameters, Pixels, ReadingBatch, Tags
from lightspan.datamodules.multispectral.batch import MultispectralBatch, MultispectralSeriesBatch

Objects = Annotated[Tensor, Field("int64", "B K")]
Number = Annotated[Tensor, Field("int64", "B")]
Scalar = Annotated[Tensor, Field("float32", "B")]
Vector = Annotated[Tensor, Field("float32", "B 3")]
Matrix = Annotated[Tensor, Field("float32", "B 3 3")]
Sentence = Annotated[Tensor, Field("int64", "B T")]


class SceneBatch(TypedDict):
    """Rendered scenes with exact labels of objects and pixels, see `lightspan.datamodules.rendered.scenes`.

    Objects are listed from the nearest to the farthest; places beyond the last object of a scene hold -1, or 0.

    instances: 0 for the ground, else 1 + the place of the object that can be seen.
    semantic: 0 for the ground, else 1 + that object's shape.
    depth: of what can be seen, in (1, 10]; the ground's is 10.
    shape: a place in `SHAPES`.
    colour: a place in `COLOURS`.
    texture: a place in `TEXTURES`.
    size: a place in `SIZES`.
    pose: x and y of the centre and the radius, in pixels, and the angle in radians.
    visible: the share of an object's pixels that no nearer one hides, in [0, 1].
    hides: 1 where object i lies in front of a pixel of object j.
    tags: 1 for each of `TAGS` that holds of an object that can be seen.
    tags_known: 0 for the tags that a method must not read.
    label: the shape of the object with the most pixels in sight; the number of shapes if there is none.
    label_known: 0 where a method must not read the label.
    """

    image: Image
    instances: Pixels
    semantic: Pixels
    depth: Annotated[Tensor, Field("float32", "B H W")]
    shape: Objects
    colour: Objects
    texture: Objects
    size: Objects
    pose: Annotated[Tensor, Field("float32", "B K 4")]
    visible: Annotated[Tensor, Field("float32", "B K")]
    hides: Annotated[Tensor, Field("int64", "B K K")]
    tags: Tags
    tags_known: Tags
    label: Label
    label_known: Number
    index: Index


class SceneViewsBatch(SceneBatch):
    """A `SceneBatch` whose scenes also have several views, which are random variants of the image. Labels of pixels are
    those of the image; a tag may hold of what a view has cut off.

    views: H and W may differ between views.
    parameters: as in `ViewsBatch`; absent where views are made without them.
    """

    views: Images
    parameters: NotRequired[Parameters]


class CaptionedSceneBatch(SceneBatch):
    """A `SceneBatch` whose scenes also have a sentence.

    tokens: of the sentence with its special tokens.
    mask: 1 where a token is the sentence's own and 0 on padding, which is at the end.
    caption_known: 0 where a method must not read the sentence.
    """

    tokens: Sentence
    mask: Sentence
    caption_known: Number


class ScenePairBatch(TypedDict):
    """Two rendered views of each scene, with known cameras, see `lightspan.datamodules.rendered.pairs`.

    A point X of the first camera's coordinates is rotation X + translation in the second's. Pixels have their middles
    at whole numbers.

    views: V is 2.
    depth: along the axis of the view's camera.
    matches: x and y in the other view, in pixels, of the point that a pixel shows.
    covisible: 1 where the other view shows that point too.
    turn: the rotation as a vector: its axis times its angle, in radians.
    translation: in the unit of the depths.
    intrinsics: of both cameras.
    label: how many boxes a scene has more than the fewest.
    """

    views: Annotated[list[Tensor], Field("float32", "V B C H W", read=True, of="image")]
    depth: Annotated[Tensor, Field("float32", "B V H W")]
    matches: Annotated[Tensor, Field("float32", "B V H W 2")]
    covisible: Annotated[Tensor, Field("int64", "B V H W")]
    rotation: Matrix
    turn: Vector
    translation: Vector
    intrinsics: Matrix
    label: Label
    index: Index


class PersonBatch(TypedDict):
    """Rendered pictures of persons in tracklets, see `lightspan.datamodules.rendered.persons`.

    label: the person that the tracklet is said to show, counted from 0 in the set.
    identity: the person that the picture shows, numbered over all sets: to judge by, not to learn from.
    tracklet: numbered over all sets.
    frame: the picture's place in its tracklet.
    """

    image: Image
    label: Label
    identity: Number
    tracklet: Number
    camera: Number
    frame: Number
    index: Index


class WordBatch(ReadingBatch):
    """Rendered pictures of printed words, see `lightspan.datamodules.rendered.words`.

    characters: 1 to 26 for the letters of the word, and 0 behind its end.
    ink: 1 where letters cover at least half of a pixel.
    label: the word's place in the vocabulary of its set.
    """

    ink: Pixels
    label: Label


class SpelledWordBatch(WordBatch):
    """A `WordBatch` whose words also occur in a sentence.

    tokens: of the sentence with its special tokens.
    mask: 1 where a token is the sentence's own and 0 on padding, which is at the end.
    """

    tokens: Annotated[Tensor, Field("int64", "B P")]
    mask: Annotated[Tensor, Field("int64", "B P")]


class SpeechBatch(AudioBatch):
    """Generated speech with exact labels, see `lightspan.datamodules.rendered.speech`. The label is the speaker.

    phone: the phone in the middle of each frame of 25 ms every 10 ms; -1 where there is none.
    """

    phone: Annotated[Tensor, Field("int64", "B T")]


class LandBatch(MultispectralBatch):
    """Rendered scenes of land, see `lightspan.datamodules.rendered.land`. The label is the material of most of it.

    cover: the land cover of each pixel, a place in `MATERIALS`.
    tags: 1 for each of `MATERIALS` that covers a part of the scene.
    tags_known: 1 throughout.
    day: of the year, in [0, 365).
    """

    cover: Pixels
    tags: Tags
    tags_known: Tags
    day: Scalar


class LandSeriesBatch(MultispectralSeriesBatch):
    """Rendered series of scenes of land, see `lightspan.datamodules.rendered.land`, not valid under clouds.

    clear: the image without clouds: to judge by, not to learn from.
    cover: the land cover of each pixel, a place in `MATERIALS`.
    tags: 1 for each of `MATERIALS` that covers a part of the scene.
    tags_known: 1 throughout.
    day: of the year, ascending, in [0, 365).
    """

    clear: Annotated[Tensor, Field("float32", "B C T H W")]
    cover: Pixels
    tags: Tags
    tags_known: Tags
    day: Annotated[Tensor, Field("float32", "B T")]


class SliceBatch(TypedDict):
    """Rendered slices through bodies, see `lightspan.datamodules.rendered.slices`.

    image: C is 1.
    organs: 0 outside of the patient, else 1 + a place in `ANATOMY`.
    lesion: 1 where a lesion is.
    label: the kind of the lesion that the slice shows, 0 without one.
    radius: of that lesion, in pixels; 0 without one.
    patient: numbered over all sets.
    """

    image: Image
    organs: Pixels
    lesion: Pixels
    label: Label
    radius: Scalar
    patient: Number
    index: Index
