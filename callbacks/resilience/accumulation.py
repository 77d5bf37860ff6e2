"""Lets a resumed run divide its steps into another number of micro-batches, as another number of GPUs may need."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Accumulation(Callback):
    """Translates a checkpoint to another `trainer.accumulate_grad_batches` than the one it was written with.

    Lightning counts micro-batches, the data count samples, and the optimiser counts steps. A checkpoint is between
    two steps, so its micro-batches can be counted in steps and then in the new micro-batches; a loader that refuses to
    continue with other micro-batches is given the new number. Nothing is translated, and the loader refuses, if
    trainer.limit_train_batches is set: it counts micro-batches and would end epochs at other places.
    """

    alters_training = False  # see config.identity

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        loop = checkpoint.get("loops", {}).get("fit_loop")
        if loop is None or trainer.limit_train_batches != 1.0:
            return
        loaders = [state for state in loop["state_dict"].get("combined_loader", []) if "accumulate" in state]
        before, now = {state["accumulate"] for state in loaders}, trainer.accumulate_grad_batches
        if len(before) != 1 or before == {now}:
            return
        progress = loop["epoch_loop.batch_progress"]
        counts = [progress["total"], progress["current"]]
        (parts,) = before
        if any(count["ready"] % parts for count in counts):
            return
        for count in counts:
            more = count["ready"] // parts * now - count["ready"]
            # Not each separately: a checkpoint written while a batch ends has completed one less than it has begun.
            for name in count:
                count[name] += more
        for state in loaders:
            state["accumulate"] = now
