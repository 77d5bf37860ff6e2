"""Batches of what an agent saw and did.

Shapes: B samples, C H W image, A numbers of an action, S numbers of a state.
"""

from typing import Annotated

from torch import Tensor

from lightspan.core.batches import Field
from lightspan.datamodules.image.batch import ImageBatch


class StepBatch(ImageBatch):
    """A step each, of an agent that has a finite number of actions.

    image: before the action.
    next_image: some steps later, standardised as the image.
    action: in [0, the number of actions).
    state: the truth about the world before the action, which a method reads to judge itself, not to learn.
    label: the task, which the images do not show.
    """

    next_image: Annotated[Tensor, Field("float32", "B C H W")]
    action: Annotated[Tensor, Field("int64", "B")]
    state: Annotated[Tensor, Field("float32", "B S")]


class WalkBatch(StepBatch):
    """Steps with the truth about each pixel of the image.

    depth: from 0 near to 255 far.
    objects: the number of the object, 0 of none.
    """

    depth: Annotated[Tensor, Field("float32", "B h w")]
    objects: Annotated[Tensor, Field("int64", "B h w")]


class ControlBatch(ImageBatch):
    """As `StepBatch`, of an agent whose action is A numbers, each in [-1, 1]."""

    next_image: Annotated[Tensor, Field("float32", "B C H W")]
    action: Annotated[Tensor, Field("float32", "B A")]
    state: Annotated[Tensor, Field("float32", "B S")]
