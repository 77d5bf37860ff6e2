"""What a masked method takes hidden patches to be, as pictures.

Shapes: B pictures, C H W.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import default_collate

from lightspan.callbacks.pictures.band_colours import band_bounds, chosen_bands
from lightspan.callbacks.pictures.first_batch import enlarged, write_grid
from lightspan.callbacks.pictures.in_range import NEARLY_ALL, quantiles, shown_in_range
from lightspan.callbacks.pictures.strips import Strip, evenly_spaced, strips_figure
from lightspan.callbacks.watching.detached import detached
from lightspan.core.batches import batch_type_of, read_names
from lightspan.core.drawing import png
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.places import RunPath
from lightspan.nn.masking.hidden_patches import Reconstruction
from lightspan.training.strategies import gathered

GREY = 0.5  # in place of what is hidden
MOST_SLICES = 16


class Reconstructions(Callback):
    """After training, writes FOLDER/reconstructions.png: in each row a validation picture, what the network sees of it,
    the other view that it looks at, if there is one, and its guesses in place of what was hidden. Of recordings
    they are spectrograms: clean, with grey in place of what is to be guessed, as the network sees them, guessed. Of a
    volume, a clip and a series they are below one another, a column for each slice, frame and date, numbered from 1,
    `MOST_SLICES` of them at most, evenly spaced.

    For modules with `reconstruct(batch)`, see `lightspan.nn.masking.hidden_patches`, such as `MAE` and `CroCo`, and
    datamodules whose `val_dataloader()` has a `dataset` with `sample(index, seed)`, as those of images, of pairs and of
    recordings here do. Pictures are spread evenly over the dataset. A module that returns None gets no picture.
    Training continues as without it.

    Args:
        folder: where the picture goes.
        rows: pictures, >= 1.
    """

    alters_training = False  # see config.identity

    def __init__(self, folder: RunPath, rows: int = 8) -> None:
        if rows < 1:
            raise UserError(f"Reconstructions rows={rows} must be at least 1")
        self.folder, self.rows = Path(folder), rows

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not callable(getattr(pl_module, "reconstruct", None)):
            raise UserError(
                f"{type(pl_module).__name__} has no reconstruct(batch), which Reconstructions calls; remove the "
                "callback, or take a method that guesses pixels, such as MAE"
            )
        if not callable(getattr(trainer.datamodule, "val_dataloader", None)):  # type: ignore[attr-defined]
            raise UserError("Reconstructions reads val_dataloader() of the datamodule; train with one that has it")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data.val_dataloader(), "dataset"):
            raise UserError(
                f"Reconstructions draws validation pictures, and {type(data).__name__} gives none; name some, such as "
                "data.init_args.val_shards, or remove the callback"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        dataset = data.val_dataloader().dataset
        numbers_B, kind = evenly_spaced(len(dataset), self.rows), batch_type_of(dataset)
        pictures = default_collate([_pictures(dataset.sample(int(number), 0), kind) for number in numbers_B])
        batch = trainer.precision_plugin.convert_input({**pictures, "index": numbers_B})
        # By all ranks, since the blocks of a sharded model are gathered by all of them.
        with gathered(pl_module), detached(pl_module), trainer.precision_plugin.forward_context():
            batch = trainer.strategy.batch_to_device(batch, pl_module.device)
            found = pl_module.reconstruct(batch)  # type: ignore[operator]
        if found is not None and trainer.is_global_zero:
            flat = Reconstruction(*(None if part is None else in_one_plane(part) for part in found))  # type: ignore[arg-type]
            path, images_NCHW = self.folder / "reconstructions.png", shown(*_in_colours(flat, data))
            rows = ["as it is", "seen", *([] if found.other_BChw is None else ["the other view"]), "guessed"]
            slices = _kept_slices(found.image_BChw.shape[2:])
            if len(slices) > 1:
                strips = strips_of_slices(images_NCHW, rows, slices, upright="volume" in batch)
                write_atomic(path, png(strips_figure(strips, (torch.zeros(1, 1, 1), torch.ones(1, 1, 1)))))
            else:
                write_grid(path, images_NCHW, len(rows), padding=1.0)


def in_one_plane(part_BC: Tensor) -> Tensor:
    """Samples of any number of axes as pictures: [B C ... h w] -> [B C h n*w] of n slices, [B C L] -> [B C 1 L]."""
    *before, height, width = 1, *part_BC.shape[2:]
    part_BCnhw = part_BC.reshape(*part_BC.shape[:2], math.prod(before), height, width)
    slices_n = _kept_slices(part_BC.shape[2:]).to(part_BC.device)
    return part_BCnhw.index_select(2, slices_n).transpose(2, 3).flatten(3)


def _kept_slices(sides: Sequence[int]) -> Tensor:
    """Which slices are shown of samples of these sides, int64; a picture is one."""
    return evenly_spaced(math.prod(sides[:-2]), MOST_SLICES)


def strips_of_slices(images_NCHW: Tensor, rows: Sequence[str], slices_n: Tensor, upright: bool) -> list[Strip]:
    """What `shown` gives, a row for each of `rows` and a column for each slice.

    Args:
        upright: turns slices of volumes as `lightspan.callbacks.pictures.strips.planes` does.
    """
    tiles_NCHnW = images_NCHW.unflatten(3, (len(slices_n), -1))
    tiles_NnCHW = (tiles_NCHnW.flip(2, 4) if upright else tiles_NCHnW).permute(0, 3, 1, 2, 4)
    columns = [f"{number + 1}" for number in slices_n.tolist()]
    return [Strip(tiles_RnCHW, "", rows, columns) for tiles_RnCHW in tiles_NnCHW.split(len(rows))]


def _in_colours(found: Reconstruction, data: Any) -> tuple[Reconstruction, tuple[Tensor, Tensor] | None]:
    """Three bands of pictures that have many, each with its own black and white; others as they are."""
    bounds, bands = getattr(data, "bounds", None), getattr(data, "shown_bands", None)
    if bands is None and found.image_BChw.shape[1] in (1, 3):
        return found, bounds
    image_BCHW, guess_BCHW = (chosen_bands(part, bands) for part in (found.image_BChw, found.guess_BChw))
    hidden = found.hidden_B1hw if found.hidden_B1hw.shape[1] == 1 else chosen_bands(found.hidden_B1hw, bands)
    found = found._replace(image_BChw=image_BCHW, hidden_B1hw=hidden, guess_BChw=guess_BCHW)
    return found, band_bounds(image_BCHW.float().cpu())


def _pictures(sample: Mapping[str, Any], batch_type: type | None) -> dict[str, Any]:
    """What a network reads of a sample, such as its image, and its valid pixels, the channels that it has or the length
    of its wave.
    """
    kept = {*read_names(sample, batch_type), "valid", "length", "present"}
    return {name: value for name, value in sample.items() if name in kept}


def shown(found: Reconstruction, bounds: tuple[Tensor, Tensor] | None) -> Tensor:
    """Several pictures of each, in [0, 1], one after the other: as it is, with grey where it was hidden, the other view
    if there is one, and guessed: [3 B C H W], or [4 B C H W].

    Args:
        bounds: see `shown_in_range`; None takes those of the pictures as they are for all.
    """
    if bounds is None:
        black, white = quantiles(found.image_BChw.float().cpu(), NEARLY_ALL)
        bounds = black, white
    image_BCHW, guess_BCHW = (shown_in_range(part, bounds) for part in (found.image_BChw, found.guess_BChw))
    seen_BCHW = image_BCHW.masked_fill(found.hidden_B1hw.cpu(), GREY)
    others = [] if found.other_BChw is None else [shown_in_range(found.other_BChw, bounds)]
    return enlarged(torch.stack([image_BCHW, seen_BCHW, *others, guess_BCHW], dim=1).flatten(0, 1))
