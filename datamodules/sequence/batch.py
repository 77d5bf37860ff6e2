"""Batches of sequences of values; those of symbols are texts (`lightspan.datamodules.text.batch`).

Shapes: B sequences, L steps, C numbers of a step.
"""

from typing import Annotated, TypedDict

from torch import Tensor

from lightspan.core.batches import Field, Index, Label


class SequenceBatch(TypedDict):
    """Sequences of values, all of one length, each with its class, normalised as the data module says."""

    sequence: Annotated[Tensor, Field("float32", "B L C", read=True)]
    label: Label
    index: Index
