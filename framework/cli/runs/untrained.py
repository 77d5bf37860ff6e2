"""A run of no steps: what `trainer.max_steps=0` asks for are the weights before the first one."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Untrained(Callback):
    """Sets everything up as for training, and ends the run before its first step with a checkpoint of the weights.

    The checkpoint has no optimiser: that of a run whose schedule has no length would be no beginning of another run.

    Args:
        path: of the checkpoint, where no callback of the run writes one at its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning sets nothing up for a run of no steps, and schedules have no shape in it.
        loop = trainer.fit_loop
        loop.max_epochs = loop.epoch_loop.max_steps = 1
        loop.min_epochs = loop.epoch_loop.min_steps = None
        for callback in _checkpoints(trainer):
            callback.save_weights_only = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(callback.save_last for callback in _checkpoints(trainer)):
            trainer.save_checkpoint(self.path, weights_only=True)


def _checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
