"""Batches of pictures with texts.

Shapes: B pairs, C H W image, T tokens.
"""

from typing import Annotated, TypedDict

from torch import Tensor

from lightspan.core.batches import Field, Index, Label
from lightspan.datamodules.image.batch import Image

Caption = Annotated[Tensor, Field("int64", "B T")]
"""Of the text that belongs to a picture: its tokens, special ones included, or 1 where a token is the text's own and 0
on padding, which is at the end.
"""
Known = Annotated[Tensor, Field("int64", "B")]


class ImageTextBatch(TypedDict):
    """Pictures with a text each. Row i of picture and text are one pair."""

    image: Image
    tokens: Caption
    mask: Caption
    index: Index


class LabelledImageTextBatch(ImageTextBatch):
    """An `ImageTextBatch` whose pictures also have a class."""

    label: Label


class PartlyLabelledBatch(ImageTextBatch):
    """An `ImageTextBatch` of which some pictures have no text, and some a class. Without a text, tokens are those of an
    empty one, and without a class the label is 0.

    caption_known: 0 where there is no text.
    label_known: 0 where there is no class.
    """

    caption_known: Known
    label: Label
    label_known: Known
