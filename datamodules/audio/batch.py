"""Batches of recordings.

Shapes: B recordings, S samples of a wave.
"""

from typing import Annotated, TypedDict

from torch import Tensor

from lightspan.core.batches import Field, Index, Label


class AudioBatch(TypedDict):
    """Recordings at one sample rate, which the data module says as `rate`, padded with zeros at the end.

    wave: one channel, mostly in [-1, 1].
    length: samples of each recording before its padding, in [1, S].
    label: 0 where the data have no labels.
    """

    wave: Annotated[Tensor, Field("float32", "B S", read=True)]
    length: Annotated[Tensor, Field("int64", "B")]
    label: Label
    index: Index


class SpokenBatch(AudioBatch):
    """Spoken captions, see `lightspan.datamodules.audio.spoken`. The label is the language.

    keyword: what the caption speaks of: a place in `KEYWORDS`; the number of these if none of them.
    """

    keyword: Annotated[Tensor, Field("int64", "B")]
