"""How well does a dual encoder name what it sees? Measured while it trains, without affecting its training.

Shapes: N validation images, C classes, T tokens, D width of the common space.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightspan.callbacks.watching.detached import detached, of_all_ranks
from lightspan.core.errors import UserError
from lightspan.evaluation.probes.zero_shot import class_rows, retrieval_at_1, zero_shot_accuracy
from lightspan.training.strategies import gathered

NEEDED = ("encode_image", "encode_text")


class ZeroShot(Callback):
    """Logs zero_shot/accuracy, zero_shot/accuracy_present and zero_shot/retrieval_at_1 every few epochs, after the
    last, and in `lightspan validate`.

    For a LightningModule whose `encoders` have `encode_image` and `encode_text`, and a datamodule with a `tokenizer`,
    `class_names` and a `val_dataloader()` whose batches have "image", "label" and "index". The first accuracy is among
    all classes, the second among those that validation images have: among the unseen ones, if these are all unseen.
    Retrieval is among all validation texts, where batches have them ("tokens" and "mask").

    Detached like `OnlineProbes`: nothing of the run changes. Samples of all ranks count, each once.

    Args:
        templates: sentences with {} where the class is named; the rows of several are averaged.
        class_names: of the labels from 0; None takes the datamodule's.
        every_n_epochs: >= 1.
    """

    alters_training = False  # see config.identity

    def __init__(
        self,
        templates: tuple[str, ...] = ("a photo of a {}",),
        class_names: list[str] | None = None,
        every_n_epochs: int = 1,
    ) -> None:
        if every_n_epochs < 1 or not templates:
            raise UserError(
                f"ZeroShot every_n_epochs={every_n_epochs} must be at least 1, and templates={list(templates)} one"
            )
        self.templates, self.class_names, self.every_n_epochs = tuple(templates), class_names, every_n_epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        encoders, data = getattr(pl_module, "encoders", None), trainer.datamodule  # type: ignore[attr-defined]
        if not all(callable(getattr(encoders, name, None)) for name in NEEDED):
            raise UserError(
                f"{type(pl_module).__name__} has no encoders with {' and '.join(NEEDED)}, which ZeroShot calls; train "
                "an image and a text encoder, or remove the callback"
            )
        if getattr(data, "tokenizer", None) is None or (self.class_names or getattr(data, "class_names", None)) is None:
            raise UserError(
                f"ZeroShot needs a datamodule with a tokenizer and class names, and {type(data).__name__} lacks one; "
                "set class_names of the callback, train on pairs of images and texts, or remove it"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        last = epochs == trainer.max_epochs or trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step
        if last or epochs % self.every_n_epochs == 0:
            self._measure(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        encoders: Any = pl_module.encoders
        with gathered(pl_module), detached(pl_module), trainer.precision_plugin.forward_context():
            class_CD = class_rows(
                data.tokenizer,
                lambda *texts: encoders.encode_text(*(x.to(pl_module.device) for x in texts)),
                self.class_names or data.class_names,
                self.templates,
            )
            columns = [torch.cat(parts) for parts in zip(*_encoded(trainer, pl_module), strict=True)]
        label_N, image_ND, *text = of_all_ranks(trainer, columns[1:], columns[0])
        figures = {
            "zero_shot/accuracy": zero_shot_accuracy(image_ND, class_CD, label_N),
            "zero_shot/accuracy_present": zero_shot_accuracy(image_ND, class_CD, label_N, label_N.unique()),
        }
        if text:
            figures["zero_shot/retrieval_at_1"] = retrieval_at_1(image_ND, text[0])
        pl_module.log_dict(figures, batch_size=1, sync_dist=trainer.world_size > 1)


def _encoded(trainer: Trainer, module: Any) -> Iterator[list[Tensor]]:
    """Index, label, image rows and, where there are texts, their rows, of each batch of this rank."""
    for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
        batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), module.device)
        texts = [module.encoders.encode_text(batch["tokens"], batch["mask"])] if "tokens" in batch else []
        yield [batch["index"], batch["label"], module.encoders.encode_image(batch["image"]), *texts]
