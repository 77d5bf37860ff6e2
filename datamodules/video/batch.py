"""Batches of video.

Shapes: B samples, V clips of a sample, C channels, T frames, H W pixels, K clips that were augmented by themselves,
P parameters of a view, L tokens of a text, h w pixels of a hint, E numbers of an embedding.
"""

from typing import Annotated, NotRequired, TypedDict

from torch import Tensor

from lightspan.core.batches import Field, Index, Label


class ClipBatch(TypedDict):
    """Clips of one length, standardised per channel.

    fps: frames of the clip per second of the video, above 0.
    frames: which of the video's frames each one is, counted from 0 in the order in which they are shown.
    """

    clip: Annotated[Tensor, Field("float32", "B C T H W", read=True)]
    fps: Annotated[Tensor, Field("float32", "B")]
    frames: NotRequired[Annotated[Tensor, Field("int64", "B T")]]
    label: Label
    index: Index


Text = Annotated[Tensor, Field("int64", "B L")]


class ClipTextBatch(TypedDict):
    """Clips, as in `ClipBatch`, each with a text that asks about it and the answer.

    tokens: of question and answer; 0 on padding, which is at the end.
    mask: 1 where a token is the text's own and 0 on padding.
    learned: 1 on the tokens of the answer.
    clip_at: which token the clip stands before, in [0, L].
    """

    clip: Annotated[Tensor, Field("float32", "B C T H W", read=True)]
    fps: Annotated[Tensor, Field("float32", "B")]
    frames: NotRequired[Annotated[Tensor, Field("int64", "B T")]]
    tokens: Text
    mask: Text
    learned: Text
    clip_at: Annotated[Tensor, Field("int64", "B")]
    index: Index


class LitClipBatch(TypedDict):
    """Clips of a face, of pixels or latents, and what a model of them is conditioned on: the person, and the light.

    fps: as in `ClipBatch`.
    face: 1 where a frame shows the face.
    reference: a picture of the same person, as the frames are.
    reference_face: 1 where it shows the face.
    portrait: that picture in pixels, as an adapter reads it.
    shading: the face of each frame in white under the light of the clip, in pixels where 1 is as bright as white under
        even light, and 0 beside it.
    embedding: of the reference.
    light: nine coefficients for each colour, see `lightspan.datamodules.rendered.harmonic_light`: to judge by, not to
        learn from.
    label: the person.
    """

    clip: Annotated[Tensor, Field("float32", "B C T H W", read=True)]
    fps: Annotated[Tensor, Field("float32", "B")]
    face: Annotated[Tensor, Field("int64", "B T H W")]
    reference: Annotated[Tensor, Field("float32", "B C H W")]
    reference_face: Annotated[Tensor, Field("int64", "B H W")]
    portrait: Annotated[Tensor, Field("float32", "B 3 h w")]
    shading: Annotated[Tensor, Field("float32", "B 3 T h w")]
    embedding: NotRequired[Annotated[Tensor, Field("float32", "B E")]]
    light: NotRequired[Annotated[Tensor, Field("float32", "B 9 3")]]
    label: Label
    index: Index


class ClipsBatch(TypedDict):
    """Several clips of each video, as in `ClipBatch`: each start at each speed, those of one start side by side."""

    views: Annotated[list[Tensor], Field("float32", "V B C T h w", read=True, of="clip")]
    fps: Annotated[Tensor, Field("float32", "B V")]
    frames: Annotated[Tensor, Field("int64", "B V T")]
    label: Label
    index: Index


class DrawnClipsBatch(TypedDict):
    """Clips whose augmentation is drawn and will be made on the device, where the batch becomes a `ClipBatch` or a
    `ClipsBatch`.

    clips: as they are, uint8.
    drawn: the bits of `lightspan.datamodules.image.batch.ViewParameters`, once for all speeds of a start.
    seed: of the grain.
    """

    clips: Annotated[list[Tensor], Field("uint8", "V B C T H W", read=True)]
    drawn: Annotated[Tensor, Field("int32", "B K P")]
    seed: Annotated[Tensor, Field("int64", "B K")]
    fps: Annotated[Tensor, Field("float32", "B V")]
    frames: Annotated[Tensor, Field("int64", "B V T")]
    label: Label
    index: Index
