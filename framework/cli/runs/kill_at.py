"""What `lightspan prove-resume` adds to runs that are to be killed, and no recipe may name: a kill at a known place."""

import os
import signal
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

Moment = Literal["batch_start", "before_backward", "before_step", "batch_end", "after_save"]


class KillAt(Callback):
    """Sends SIGKILL to its own process: nothing is flushed, closed or printed.

    Args:
        step: optimiser steps finished before the interrupted one, >= 0.
        place: where in that step; "after_save" is after the callbacks of the first step from this one on that has
            written a checkpoint, and before Lightning logs and validates.
        rank: which rank's process.
        ranks: only in a start on so many; None: in any.
    """

    alters_training = False  # see config.identity

    def __init__(self, step: int, place: Moment, rank: int = 0, ranks: int | None = None) -> None:
        self.step, self.place, self.rank, self.ranks = step, place, rank, ranks
        self._began = self._saved = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        save, ends = trainer.save_checkpoint, pl_module.on_train_batch_end

        def saves(*arguments: Any, **settings: Any) -> None:
            save(*arguments, **settings)
            self._saved = trainer.global_step

        def ends_after_all_callbacks(*arguments: Any) -> None:
            ends(*arguments)
            if self._saved == trainer.global_step > self.step:
                self._began = self.step
                self._kill("after_save", trainer)

        trainer.save_checkpoint = saves  # type: ignore[method-assign]
        pl_module.on_train_batch_end = ends_after_all_callbacks  # type: ignore[method-assign, assignment]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._began = trainer.global_step
        self._kill("batch_start", trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._kill("before_backward", trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._kill("before_step", trainer)

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        self._kill("batch_end", trainer)

    def _kill(self, place: str, trainer: Trainer) -> None:
        meant = self.ranks in (None, trainer.world_size)
        if meant and (self._began, place, trainer.global_rank) == (self.step, self.place, self.rank):
            os.kill(os.getpid(), signal.SIGKILL)
