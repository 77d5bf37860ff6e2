"""A calm console: a bar for training if the output is a terminal, and always one line for every validation.

Both show the training loss, by its name: `train/loss`, or one with a unit, such as `train/loss_nats`.
"""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.trainer.states import TrainerFn

TRAINING_LOSS = "train/loss"
SHOWN = (TRAINING_LOSS, "val")


class ProgressLine(TQDMProgressBar):
    """Prints `step 100  12 s  train/loss_nats 1.88  val/loss_nats 1.93` after every validation; the bar disappears when
    training ends. The loss is the last that was logged: of one step on one rank, a mean over several.

    Args:
        refresh_rate: training batches between two redraws of the bar, >= 1.
    """

    alters_training = False  # see config.identity

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate if sys.stdout.isatty() else 0, leave=False)
        self._started_s = time.monotonic()

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.leave = False
        return bar

    def init_sanity_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True) if self.trainer.state.fn == TrainerFn.FITTING else super().init_validation_tqdm()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Those that a module shows in the bar, and the training loss, which not every method does."""
        losses = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith(TRAINING_LOSS)}
        return losses | super().get_metrics(trainer, pl_module)

    def on_train_start(self, *arguments: Any) -> None:
        self._started_s = time.monotonic()
        super().on_train_start(*arguments)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and trainer.is_global_zero:
            metrics = {name: value for name, value in trainer.callback_metrics.items() if name.startswith(SHOWN)}
            line = "  ".join(f"{name} {float(value):.4f}" for name, value in sorted(metrics.items()))
            seconds = time.monotonic() - self._started_s
            Tqdm.write(f"step {trainer.global_step:>6}  {seconds:>5.0f} s  {line}".rstrip(), file=sys.stdout)
            sys.stdout.flush()
