"""The batches that datamodules give to methods: typed mappings, one for each modality.

Shapes: B samples on this rank in one micro-batch, T context length, C H W image, V views, K tasks, F columns.
"""

from typing import TypedDict

from torch import Tensor


class TextBatch(TypedDict):
    """Windows of text as token ids.

    tokens: int64 [B, T+1], each in [0, vocab_size). `tokens[:, :-1]` is read, `tokens[:, 1:]` is predicted.
    """

    tokens: Tensor


class LabelledTextBatch(TypedDict):
    """Tokenized texts, truncated or padded to one length, each with its class.

    tokens: int64 [B, T].
    mask: int64 [B, T], 1 where a token is the text's own and 0 on padding, which is at the end.
    label: int64 [B], each in [0, num_classes).
    index: int64 [B], the sample's position in its dataset.
    """

    tokens: Tensor
    mask: Tensor
    label: Tensor
    index: Tensor


class ImageBatch(TypedDict):
    """One picture per sample, standardised per channel to about zero mean and unit variance.

    image: float32 [B, C, H, W].
    label: int64 [B], each in [0, num_classes). A method that learns without labels ignores it.
    index: int64 [B], the sample's position in its dataset; the same on every rank and in every epoch.
    """

    image: Tensor
    label: Tensor
    index: Tensor


class ViewsBatch(TypedDict):
    """Several views of each picture. Row i of every view comes from the same picture.

    views: V tensors, float32 [B, C, H, W], standardised as in `ImageBatch`; H and W may differ between views.
    label: int64 [B].
    index: int64 [B].
    """

    views: list[Tensor]
    label: Tensor
    index: Tensor


class TasksBatch(TypedDict):
    """One picture of each of several tasks a sample, standardised as each task's own.

    image: float32 [B, K, C, H, W], of the tasks in their order.
    label: int64 [B, K], each a class of its task. A method that learns without labels leaves it alone.
    index: int64 [B], the sample's number; a task's own sample is that number modulo its size.
    """

    image: Tensor
    label: Tensor
    index: Tensor


class ImageTextBatch(TypedDict):
    """Pictures with a text each. Row i of picture and text are one pair.

    image: float32 [B, C, H, W], standardised as in `ImageBatch`.
    tokens: int64 [B, T], of the text with its special tokens.
    mask: int64 [B, T], 1 where a token is the text's own and 0 on padding, which is at the end.
    index: int64 [B], the sample's position in its dataset.
    """

    image: Tensor
    tokens: Tensor
    mask: Tensor
    index: Tensor


class LabelledImageTextBatch(ImageTextBatch):
    """An `ImageTextBatch` whose pictures also have a class.

    image: float32 [B, C, H, W].
    tokens: int64 [B, T].
    mask: int64 [B, T].
    index: int64 [B].
    label: int64 [B], each in [0, num_classes).
    """

    label: Tensor


class TableBatch(TypedDict):
    """Rows of a table, with a number to predict from each.

    table: float32 [B, F], columns standardised as those of the training rows.
    target: float32 [B], in the unit that the data module names.
    index: int64 [B], the row's position in its dataset.
    """

    table: Tensor
    target: Tensor
    index: Tensor


class TableViewsBatch(TypedDict):
    """Several views of each row of a table. Row i of every view comes from the same row.

    views: V tensors, float32 [B, F].
    target: float32 [B].
    index: int64 [B].
    """

    views: list[Tensor]
    target: Tensor
    index: Tensor
