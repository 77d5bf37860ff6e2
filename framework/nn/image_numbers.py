"""Image indices on the host, which seed what is drawn for each image.

A batch's `index` comes from the loader, on the host, and goes to the device with the rest. To read it back there in a
step would wait for all that the device has yet to do. So `Method` leaves the host's tensor at the device's one.
"""

from collections.abc import Mapping, Sized
from typing import Any

from torch import Tensor

from lightspan.core.batches import WHOLE, require_fields, require_rows
from lightspan.core.devices import has_values
from lightspan.core.errors import UserError

_HOST = "_lightspan_on_host"


def keep_on_host(before: Any, after: Any) -> None:
    """Leaves the `index` of a batch before it went to the device at that of the batch which came from it.

    Does nothing for batches without one, and for those that stay or have always been where they are. The batch keeps
    its fields: a further tensor on the host would be moved by DDP, and a list of numbers taken for rows by Lightning.
    """
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        return
    host_B, index_B = before.get("index"), after.get("index")
    both = isinstance(host_B, Tensor) and isinstance(index_B, Tensor)
    if both and host_B is not index_B and host_B.device.type == "cpu":  # type: ignore[union-attr]
        setattr(index_B, _HOST, host_B)


def index_in(batch: Mapping[str, Any], owner: object) -> Tensor:
    """A batch's `index`, int64 [B]. Raises: UserError if it has none, or one of another kind or shape."""
    method = type(owner).__name__
    require_fields(batch, method)
    if "index" not in batch:
        raise UserError(
            f"{method} needs the images' numbers, and this batch has no index (it holds "
            f"{', '.join(sorted(batch))}); let the dataset give each sample a whole number of its own as index"
        )
    index_B = batch["index"]
    if not isinstance(index_B, Tensor) or index_B.ndim != 1 or index_B.dtype not in WHOLE:
        found = f"{index_B.dtype} {list(index_B.shape)}" if isinstance(index_B, Tensor) else type(index_B).__name__
        raise UserError(
            f"{method} needs the images' numbers as index, a tensor int64 [B], and this batch gives {found}; let the "
            "dataset give each sample a whole number of its own as index"
        )
    require_rows(batch, "index", method)
    return index_B


def image_numbers(index_B: Tensor) -> list[int]:
    """The images' numbers of a batch's `index`, int64 [B], read from the device only if no `Method` brought it there.

    `lightspan plan`, which knows no numbers, gets some instead.

    Raises: UserError for a number below 0, of which no draw is a function.
    """
    host_B: Tensor = getattr(index_B, _HOST, index_B)
    numbers: list[int] = host_B.tolist() if has_values(host_B) else list(range(len(host_B)))
    if numbers and min(numbers) < 0:
        raise UserError(
            f"a batch has an image numbered {min(numbers)} in index, and numbers count from 0; let the dataset give "
            "each sample its place"
        )
    return numbers


def training_images(data: Any) -> int | None:
    """How many training images a data module has, where it knows."""
    training = getattr(data, "train", None)
    return len(training) if isinstance(training, Sized) else None


def require_room(data: Any, room: int, method: str) -> None:
    """For data that know how many training images they have.

    Args:
        data: a data module, or None.
        room: places that a memory of the method has, its `images`.
    Raises: UserError for more images than places.
    """
    if (count := training_images(data)) is not None and count > room:
        raise UserError(
            f"the data have {count} training images, and {method}'s memory holds images={room}; set "
            f"model.init_args.images={count}"
        )


def require_places(batch: Any, room: int, method: str) -> None:
    """For a batch that is still on the host. Raises: UserError for images whose number is not in [0, room), which would
    crash a kernel.
    """
    index_B = batch.get("index") if isinstance(batch, Mapping) else None
    if isinstance(index_B, Tensor) and len(index_B) and has_values(index_B):
        least, largest = (int(number) for number in index_B.aminmax())
        if least < 0 or largest >= room:
            raise UserError(
                f"a batch has images numbered {least} to {largest}, and {method}'s memory has places for [0, "
                f"images={room}); set model.init_args.images above the largest number"
            )
