"""What a generative model draws so far, as one picture beside the run's figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torchvision.utils import make_grid

from lightspan.callbacks.pictures.in_range import shown_in_range
from lightspan.callbacks.watching.detached import detached
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.places import RunPath
from lightspan.core.pixels import png_of
from lightspan.training.strategies import gathered

MOST_CLASSES, COLUMNS = 10, 8


class PictureSamples(Callback):
    """Writes a grid of drawn images, one column per class, to FOLDER/samples-STEP.png every few epochs and at the end.

    For modules with `sample(label, shape, steps=..., eta=..., guidance=..., seed=..., clip=...)` -> [B C H W], such as
    `DenoisingDiffusion`, and 1 or 3 channels. Data modules with `bounds`, such as `ImageData`, say what is black and
    what is white: images are clipped to this range while drawn, and shown in it. Training continues as without it.

    Args:
        folder: where the pictures go.
        shape: C H W of an image; None is that of the images it was trained on.
        classes: one column each; None is the first ten of the module's `num_classes`, or eight columns of a module
            without classes.
        rows: images of each class, >= 1.
        every_n_epochs: 0 draws only at the end.
        steps, eta, guidance, seed: as the module's `sample` takes them.
    """

    alters_training = False  # see config.identity

    def __init__(
        self,
        folder: RunPath,
        shape: tuple[int, int, int] | None = None,
        classes: list[int] | None = None,
        rows: int = 8,
        every_n_epochs: int = 0,
        steps: int = 50,
        eta: float = 0.0,
        guidance: float = 1.0,
        seed: int = 0,
    ) -> None:
        if classes == [] or rows < 1 or every_n_epochs < 0 or (shape is not None and shape[0] not in (1, 3)):
            raise UserError(
                f"PictureSamples needs at least one class, rows={rows} at least 1, every_n_epochs={every_n_epochs} "
                f"at least 0, and 1 or 3 channels in shape={shape and list(shape)}"
            )
        self.folder, self.shape, self.classes, self.rows = Path(folder), shape, classes, rows
        self.every_n_epochs = every_n_epochs
        self.steps, self.eta, self.guidance, self.seed = steps, eta, guidance, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not callable(getattr(pl_module, "sample", None)):
            raise UserError(f"{type(pl_module).__name__} has no sample(), which PictureSamples calls; remove it")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.shape is None:
            self.shape = _shape(batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.draw(trainer, pl_module)

    def draw(self, trainer: Trainer, module: LightningModule) -> None:
        # Before other ranks return: the blocks of a sharded model are gathered by all ranks.
        if self.shape is None:  # no step was taken
            return
        count = getattr(module, "num_classes", None)
        classes = self.classes or (list(range(min(count, MOST_CLASSES))) if count else [0] * COLUMNS)
        label_B = torch.tensor(classes * self.rows, device=module.device)
        bounds = getattr(getattr(trainer, "datamodule", None), "bounds", None)
        with gathered(module), detached(module):
            images_BCHW = module.sample(  # type: ignore[operator]
                label_B,
                tuple(self.shape),
                steps=self.steps,
                eta=self.eta,
                guidance=self.guidance,
                seed=self.seed,
                clip=bounds,
            )
        if trainer.is_global_zero:
            shown_BCHW = shown_in_range(images_BCHW, bounds)
            grid_CHW = make_grid(shown_BCHW, nrow=len(classes), pad_value=0.5)
            write_atomic(self.folder / f"samples-{trainer.global_step:07d}.png", png_of(grid_CHW))


def _shape(batch: Any) -> tuple[int, int, int]:
    """C H W of a batch's images. Raises: UserError for none, or another number of channels than 1 or 3."""
    image_BCHW = batch.get("image") if isinstance(batch, Mapping) else None
    if not isinstance(image_BCHW, torch.Tensor) or image_BCHW.ndim != 4 or image_BCHW.shape[1] not in (1, 3):
        raise UserError("PictureSamples finds no images of 1 or 3 channels in the batches; set shape to C H W")
    channels, height, width = image_BCHW.shape[1:]
    return channels, height, width
