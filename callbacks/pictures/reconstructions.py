"""What a masked method takes hidden patches to be, as pictures.

Shapes: B pictures, C H W.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightspan.callbacks.pictures.feature_pictures import evenly_spaced
from lightspan.callbacks.pictures.first_batch import enlarged, write_grid
from lightspan.callbacks.pictures.in_range import shown_in_range
from lightspan.callbacks.watching.detached import detached
from lightspan.errors import UserError
from lightspan.nn.masking.hidden_patches import Reconstruction
from lightspan.strategies import gathered

GREY = 0.5  # in the place of what is hidden


class Reconstructions(Callback):
    """After training, writes FOLDER/reconstructions.png: in each row a validation picture, what the network sees of it,
    and its guesses in the place of what was hidden.

    For modules with `reconstruct(batch)`, see `lightspan.nn.masking.hidden_patches`, such as `MAE`, and datamodules
    whose `val_dataloader()` has a `dataset` with `sample(index, seed)`, as those of images here do. Pictures are spread
    evenly over the dataset. A module that returns None gets no picture. Training continues as without it.

    Args:
        folder: where the picture goes.
        rows: pictures, >= 1.
    """

    alters_training = False  # see config.identity

    def __init__(self, folder: str, rows: int = 8) -> None:
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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        dataset = data.val_dataloader().dataset
        numbers_B = evenly_spaced(len(dataset), self.rows)
        images = [torch.as_tensor(dataset.sample(int(number), 0)["image"]) for number in numbers_B]
        batch = trainer.precision_plugin.convert_input({"image": torch.stack(images), "index": numbers_B})
        # By all ranks, since the blocks of a sharded model are gathered by all of them.
        with gathered(pl_module), detached(pl_module), trainer.precision_plugin.forward_context():
            batch = trainer.strategy.batch_to_device(batch, pl_module.device)
            found = pl_module.reconstruct(batch)  # type: ignore[operator]
        if found is not None and trainer.is_global_zero:
            images_BCHW = shown(found, getattr(data, "bounds", None))
            write_grid(self.folder / "reconstructions.png", images_BCHW, 3, padding=1.0)


def shown(found: Reconstruction, bounds: tuple[Tensor, Tensor] | None) -> Tensor:
    """Three pictures of each, in [0, 1], one after the other: as it is, with grey where it was hidden, and guessed:
    [3 B C H W].
    """
    image_BCHW, guess_BCHW = (shown_in_range(part, bounds) for part in (found.image_BChw, found.guess_BChw))
    seen_BCHW = image_BCHW.masked_fill(found.hidden_B1hw.cpu(), GREY)
    return enlarged(torch.stack([image_BCHW, seen_BCHW, guess_BCHW], dim=1).flatten(0, 1))
