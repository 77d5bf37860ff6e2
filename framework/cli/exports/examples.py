"""A batch of a run, as its data give it or of a given shape: what an export learns its inputs from."""

import contextlib
import io
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from lightspan.cli.config.build import Built
from lightspan.core.batches import batch_type_of, fields_of, single_field
from lightspan.core.errors import UserError
from lightspan.datamodules.loading.sample_sets import SampleSets
from lightspan.datamodules.shards.stream import Shards

Moments = tuple[Tensor, Tensor]


def example_batch(built: Built, shape: tuple[int, ...] | None = None) -> tuple[Any, Moments | None]:
    """A batch of validation data, or of training data if nothing validates, and the moments of its pictures.

    Args:
        shape: C H W of a picture, C D H W of a volume, C T H W of a clip; its batch needs no data, but those that are
            here say how to standardise it. None reads them, or takes black pictures for shards that are not here.
    Returns: the batch, and mean and deviation of the channels of its pictures in [0, 1], each [C 1 1], if known.
    Raises: UserError if the data are not here, or theirs have other axes or channels than `shape`.
    """
    data: Any = built.datamodule
    known = moments_of(data) if isinstance(data, Shards) else None  # others know theirs once they are set up
    if shape is not None:
        known = known or _moments_if_here(built)
        kind = batch_type_of(data, built.model)  # some data know theirs once they are set up
        _require_axes(shape, kind)
        if known is not None and len(known[0]) != shape[0]:
            raise UserError(
                f"--shape {','.join(map(str, shape))} has {shape[0]} channels, but the run standardises pictures of "
                f"{len(known[0])}; name that many"
            )
        return {single_field(kind): torch.zeros(1, *shape)}, known
    if data is None:
        raise UserError("this run has no data to learn the inputs from; give the shape of a picture with --shape C,H,W")
    if isinstance(data, Shards | SampleSets) and (batch := data.stand_in()) is not None:
        return batch, known
    try:
        batch = _first_batch(built)
    except (UserError, OSError) as error:
        raise UserError(
            f"{error}. For a method that reads pictures, volumes or clips, --shape needs no data"
        ) from error
    return batch, moments_of(data)


def _require_axes(shape: tuple[int, ...], batch_type: type | None) -> None:
    """Raises: UserError for a `shape` with more or fewer axes than the first input of a network is declared with."""
    if (field := next((field for field in fields_of(batch_type).values() if field.read), None)) is None:
        return
    axes = field.axes.split()[1 if field.of is None else 2 :]  # without the batch, and the list of views
    if len(axes) != len(shape):
        raise UserError(
            f"--shape {','.join(map(str, shape))} has {len(shape)} numbers, but each {single_field(batch_type)} of "
            f"this run has {len(axes)}: {', '.join(axes).upper()}"
        )


def _moments_if_here(built: Built) -> Moments | None:
    """None without data, for those that are not on this machine, and for those without moments."""
    if built.datamodule is None:
        return None
    try:
        _first_batch(built)
    except (UserError, OSError):
        return None
    return moments_of(built.datamodule)


def _first_batch(built: Built) -> Any:
    """Nothing is downloaded for it: `prepare_data` is for runs."""
    data: Any = built.datamodule
    data.trainer = built.trainer
    with contextlib.redirect_stdout(io.StringIO()):  # what a run says of its data at its start
        data.setup("fit")
        for name in ("val_dataloader", "train_dataloader"):
            if getattr(type(data), name) is getattr(LightningDataModule, name):
                continue
            loaders = getattr(data, name)()
            for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
                for batch in loader:
                    return batch
    raise UserError("the data of this run give no batch")


def moments_of(data: Any) -> Moments | None:
    """Mean and deviation of pictures, from `bounds` of the data: black and white after standardising."""
    if (bounds := getattr(data, "bounds", None)) is None:
        return None
    low_C11, high_C11 = bounds
    std_C11 = 1 / (high_C11 - low_C11)
    return -low_C11 * std_C11, std_C11
