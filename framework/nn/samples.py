"""What holds of a batch as a whole: its fields have names, and each has a row for each sample.

Shapes: B samples.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightspan.core.devices import has_values
from lightspan.core.errors import UserError

WHOLE = (torch.int64, torch.int32)
"""Types of numbers that index a table; of smaller ones torch takes some for a mask."""


def described(given: Any) -> str:
    """Type and shape of a tensor, or the kind of anything else, for messages."""
    return f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"


def range_on_host(numbers: Tensor) -> tuple[int, int] | None:
    """The least and the largest of whole numbers; None without any, and where to read them would wait for a device, or
    there are shapes alone.
    """
    if numbers.device.type != "cpu" or not has_values(numbers) or not numbers.numel():
        return None
    least, largest = torch.aminmax(numbers)
    return int(least), int(largest)


def require_fields(batch: Any, method: str) -> None:
    """Raises: UserError for a batch without named fields, such as the tuples of torchvision's datasets."""
    if not isinstance(batch, Mapping):
        raise UserError(
            f"{method} reads batches by the names of their fields, and this one is a {type(batch).__name__}; let the "
            'dataset give {"image": ..., "label": ..., "index": ...}, or put it into '
            "lightspan.datamodules.image.dataset.PictureDataset"
        )


def samples_in(batch: Mapping[str, Any]) -> int | None:
    """B, by what a network reads: images, rows of a table, first views, texts, sequences, sound. None for a batch of
    something else.
    """
    views = batch.get("views")
    first = None if views is None or not len(views) else views[0]
    read = (as_given(batch), first, *map(batch.get, ("tokens", "sequence", "wave")))
    return next((len(field) for field in read if isinstance(field, Tensor)), None)


def as_given(batch: Mapping[str, Any]) -> Any:
    """The images of a batch, or the rows of a table; None where it has neither, such as a batch of views."""
    return batch["image"] if "image" in batch else batch.get("table")


def require_rows(batch: Mapping[str, Any], field: str, method: str) -> None:
    """Raises: UserError for a field of another number of rows than the batch has samples.

    Args:
        field: a name of the batch's, of a tensor [B ...].
        method: its name, for messages.
    """
    rows, samples = len(batch[field]), samples_in(batch)
    if samples not in (None, rows):
        raise UserError(
            f"{method}: {field} of this batch has {rows} rows, and the batch has {samples} samples; let the dataset "
            "give a row for each"
        )
