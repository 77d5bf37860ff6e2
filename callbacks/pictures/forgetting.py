"""What becomes of each task while later ones are learned: figures, and curves.

Shapes: B rows of this rank's batch, C classes, T tasks.
"""

from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightspan.callbacks.watching.detached import detached, log_now
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.places import RunPath
from lightspan.evaluation.gaussians.closed_form import IncrementalAccuracy
from lightspan.evaluation.scores.task_accuracy import TaskAccuracy


class Forgetting(Callback):
    """After each task tests a classifier on the validation images of all tasks so far, among their classes.

    Logs tasks/accuracy (on all classes so far; that after the last task is what papers call last accuracy),
    tasks/average_accuracy (mean of it over the tasks so far), tasks/forgetting (mean over the earlier tasks of the best
    share ever minus that now) and tasks/accuracy_of_T of each task T, and writes FOLDER/forgetting.png.

    For data with `tasks`, `task_steps()` and a validation loader for each task, as
    `lightspan.datamodules.image.variants.class_stream.ClassStream`, and any LightningModule that is called with images
    [B C H W] and gives logits [B C]. Detached like `OnlineProbes`: nothing of the run changes. Rows of all ranks count,
    each once. The counts are in the checkpoint.

    Args:
        folder: where the picture goes; None draws none.
    """

    alters_training = False  # see config.identity

    def __init__(self, folder: RunPath | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._correct: list[list[int]] = []
        self._rows: list[int] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises: UserError for data without tasks."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not all(hasattr(data, name) for name in ("tasks", "task_steps", "val_dataloader")):
            raise UserError(
                f"Forgetting needs data that come task by task, and {type(data).__name__} do not; take "
                "lightspan.datamodules.image.variants.class_stream.ClassStream, or remove the callback"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        ends = [trainer.accumulate_grad_batches * steps for steps in accumulate(data.task_steps())]
        if batch_idx + 1 in ends and ends.index(batch_idx + 1) == len(self._correct):
            self._measure(trainer, pl_module, len(self._correct))

    def result(self) -> IncrementalAccuracy:
        """What has been found so far, of at least one task."""
        return IncrementalAccuracy(tuple(map(tuple, self._correct)), tuple(self._rows))

    def state_dict(self) -> dict[str, Any]:
        return {"correct": self._correct, "rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._correct, self._rows = [list(row) for row in state_dict["correct"]], list(state_dict["rows"])

    def _measure(self, trainer: Trainer, module: LightningModule, after: int) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        counts = TaskAccuracy(len(data.tasks)).to(module.device)
        seen = sorted(number for task in data.tasks[: after + 1] for number in task)
        with detached(module):
            for on, loader in enumerate(data.val_dataloader()[: after + 1]):
                for batch in loader:
                    batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
                    with trainer.precision_plugin.forward_context():
                        logits_BC = _logits(module, batch)
                    among_BC = torch.full_like(logits_BC, -torch.inf)
                    among_BC[:, seen] = logits_BC[:, seen]
                    counts.update(among_BC, batch["label"], after, on)
            with counts.sync_context(should_sync=trainer.world_size > 1):
                self._correct.append(counts.right_TT[after, : after + 1].tolist())
                self._rows = counts.rows_TT[after, : after + 1].tolist()
        found = self.result()
        accuracies = found.after_task()
        figures = {
            "tasks/accuracy": accuracies[-1],
            "tasks/average_accuracy": sum(accuracies) / len(accuracies),
            "tasks/forgetting": found.forgetting(),
        }
        figures |= {f"tasks/accuracy_of_{row['on task']}": row["accuracy"] for row in found.table()[-after - 1 :]}
        log_now(trainer, figures)
        if self.folder is not None and trainer.is_global_zero:
            picture = found.picture("Each task after each task")
            assert picture is not None
            write_atomic(self.folder / "forgetting.png", picture)


def _logits(module: LightningModule, batch: Any) -> Tensor:
    logits_BC = module(batch["image"])
    if not isinstance(logits_BC, Tensor) or logits_BC.ndim != 2:
        got = list(logits_BC.shape) if isinstance(logits_BC, Tensor) else type(logits_BC).__name__
        raise UserError(f"{type(module).__name__}(image) gave {got}, but Forgetting needs logits [B, C]")
    return logits_BC
