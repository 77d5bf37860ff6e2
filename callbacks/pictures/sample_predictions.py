"""What a classifier or regressor says of some validation samples so far, beside what is true.

Shapes: B samples, K classes, C H W.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightspan.callbacks.pictures.in_range import shown_in_range
from lightspan.callbacks.watching.detached import detached
from lightspan.core.drawing import COLOURS, SOFT, canvas, png, tidy
from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.places import RunPath
from lightspan.training.strategies import gathered

COLUMNS = 8
RIGHT, WRONG = COLOURS[2], COLOURS[1]


class SamplePredictions(Callback):
    """Draws FOLDER/predictions.png anew at every validation, of the first samples of its first batch.

    For modules whose `predict_step(batch, 0)` gives logits [B K], K >= 2, or numbers [B] or [B, 1]; the truth is the
    batch's "label" or "target". A picture is titled with its
    class, the guess and the guess's probability, in the colour of right or wrong; without pictures, bars of the
    probabilities of truth and guess are drawn. Numbers are points of a plane of truth and guess. Validation and
    training go on as without it.

    Args:
        folder: usually ${run}/pictures, which the report shows.
        count: samples, >= 1.
        classes: their names in the order of labels; None shows labels.
    Raises: UserError when fitting starts, for a module that predicts nothing, and at a validation for predictions of
        another form, or batches without label and target.
    """

    alters_training = False  # see config.identity

    def __init__(self, folder: RunPath, count: int = 32, classes: list[str] | None = None) -> None:
        if count < 1:
            raise UserError(f"SamplePredictions count={count} must be at least 1")
        self.folder, self.count, self.classes = Path(folder), count, classes

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not is_overridden("predict_step", pl_module, LightningModule):
            raise UserError(
                f"{type(pl_module).__name__} has no predict_step(batch, batch_idx), which SamplePredictions calls; add "
                "one that returns logits or numbers, or remove the callback"
            )

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx or dataloader_idx or trainer.sanity_checking:
            return
        truth_B = _truth(batch, self.count)
        # By all ranks, since the blocks of a sharded model are gathered by all of them.
        with gathered(pl_module), detached(pl_module), trainer.precision_plugin.forward_context():
            said = _said(pl_module, batch)[: self.count].float().cpu()
        if not trainer.is_global_zero:
            return
        bounds = getattr(getattr(trainer, "datamodule", None), "bounds", None)
        pictures = _pictures(batch, self.count, bounds)
        if said.ndim == 2 and said.shape[1] > 1:
            figure = self._classes(said.softmax(dim=1), truth_B.long(), pictures)
        else:
            figure = _numbers(said.flatten(), truth_B.float())
        write_atomic(self.folder / "predictions.png", png(figure))

    def _classes(self, chances_BK: Tensor, truth_B: Tensor, pictures: Tensor | None) -> Any:
        chance_B, guess_B = chances_BK.max(dim=1)
        columns = min(COLUMNS, len(truth_B))
        rows = -(-len(truth_B) // columns)
        figure, axes = canvas("", (1.2 * columns, 1.6 * rows), (rows, columns))
        for axis in axes.flat:
            axis.axis("off")
        for number, axis in enumerate(axes.flat[: len(truth_B)]):
            truth, guess = int(truth_B[number]), int(guess_B[number])
            if pictures is not None:
                axis.imshow(pictures[number].permute(1, 2, 0).expand(-1, -1, 3))
            else:
                axis.axis("on")
                bars = [float(chances_BK[number, truth]), float(chance_B[number])]
                axis.bar(["truth", "guess"], bars, color=[SOFT, RIGHT if truth == guess else WRONG])
                axis.set_ylim(0, 1)
                axis.tick_params(labelsize=6)
            said = f"{self._called(truth)}\nsaid {self._called(guess)} {chance_B[number]:.2f}"
            axis.set_title(said, fontsize=6, color=RIGHT if truth == guess else WRONG, parse_math=False)
        return figure

    def _called(self, label: int) -> str:
        named = self.classes is not None and 0 <= label < len(self.classes)
        return one_line(self.classes[label])[:24] if named and self.classes else str(label)


def _numbers(said_B: Tensor, truth_B: Tensor) -> Any:
    figure, axes = canvas("", (4.5, 4.0))
    axis = axes[0, 0]
    shown_B = said_B.isfinite() & truth_B.isfinite()
    axis.scatter(truth_B[shown_B], said_B[shown_B], s=14, color=COLOURS[0])
    if shown_B.any():
        both = torch.cat([truth_B[shown_B], said_B[shown_B]])
        ends = [float(both.min()), float(both.max())]
        axis.plot(ends, ends, color=SOFT, linewidth=1)
    axis.set_xlabel("truth")
    axis.set_ylabel("prediction")
    tidy(axis)
    return figure


def _said(module: LightningModule, batch: Any) -> Tensor:
    said = module.predict_step(batch, 0)
    if not isinstance(said, Tensor) or said.ndim not in (1, 2):
        got = list(said.shape) if isinstance(said, Tensor) else type(said).__name__
        raise UserError(f"SamplePredictions needs logits [B, K] or numbers [B], but {type(module).__name__} gave {got}")
    return said


def _truth(batch: Any, count: int) -> Tensor:
    for name in ("label", "target") if isinstance(batch, Mapping) else ():
        value = batch.get(name)
        if isinstance(value, Tensor) and value.ndim == 1:
            return value[:count].cpu()
    raise UserError("SamplePredictions finds no label [B] or target [B] in the validation batches; remove the callback")


def _pictures(batch: Any, count: int, bounds: tuple[Tensor, Tensor] | None) -> Tensor | None:
    image = batch.get("image")
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] not in (1, 3):
        return None
    return shown_in_range(image[:count].detach(), bounds)
