"""What `lightspan prove-resume` adds to its runs: a trace of what each step saw, and a kill at a known place."""

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

Place = Literal["batch_start", "before_backward", "before_step", "batch_end", "after_save"]


class Trace(Callback):
    """Appends a line for each micro-batch to `folder`/rank-N.jsonl: its number, a digest of each sample, its loss, a
    digest of each buffer that is in no checkpoint, and the start of this process' group of ranks (`start_s`, the same
    on all of them), which distinguishes attempts.

    The digests are of the samples' bytes as they reach the model, so they do not depend on loaders, ranks or workers.
    Every line waits for the device: for proofs, not for training.

    Args:
        folder: made if missing; a resumed run appends.
    """

    alters_training = False  # see config.identity

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._file: TextIO | None = None
        self._batch = 0
        self._samples: list[str] = []
        self._start_s = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_s = float(trainer.strategy.broadcast(time.time()))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / f"rank-{trainer.global_rank}.jsonl").open("a", buffering=1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch, self._samples = trainer.fit_loop.epoch_loop.total_batch_idx, sample_digests(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        stored = pl_module.state_dict()
        line = {
            "batch": self._batch,
            "start_s": self._start_s,
            "samples": self._samples,
            "loss": float(loss),
            "buffers": {
                name: _digest(buffer.detach().cpu()) for name, buffer in pl_module.named_buffers() if name not in stored
            },
        }
        assert self._file is not None
        self._file.write(json.dumps(line) + "\n")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._file is not None:
            self._file.close()


class StopAfter(Callback):
    """Ends a run after `steps` optimiser steps without changing anything that depends on its length.

    With `trainer.max_steps` instead, a schedule would run completely, warm-up included, in these few steps:
    another experiment than the recipe's, and so rough that a last bit grows a hundredfold within five steps.
    """

    alters_training = False  # see config.identity

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Schedules have read their length, and `Checkpoint`, the last callback, then checks whether a step is left.
        trainer.fit_loop.epoch_loop.max_steps = self.steps


class KillAt(Callback):
    """Sends SIGKILL to its own process: nothing is flushed, closed or printed.

    Args:
        step: optimiser steps finished before the interrupted one, >= 0.
        place: where in that step; "after_save" is after the callbacks of the first step from this one on that has
            written a checkpoint, and before Lightning logs and validates.
        rank: which rank's process.
    """

    alters_training = False  # see config.identity

    def __init__(self, step: int, place: Place, rank: int = 0) -> None:
        self.step, self.place, self.rank = step, place, rank
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
        if (self._began, place, trainer.global_rank) == (self.step, self.place, self.rank):
            os.kill(os.getpid(), signal.SIGKILL)


def sample_digests(batch: Any) -> list[str]:
    """One digest for each row of a batch: of that row's bytes in all its tensors with the samples on the first axis."""
    tensors = [tensor.detach().cpu() for tensor in _tensors(batch)]
    rows = len(tensors[0]) if tensors and tensors[0].ndim else 0
    return [_digest(*(t[i] for t in tensors if t.ndim and len(t) == rows)) for i in range(rows)]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _digest(*tensors: Tensor) -> str:
    return hashlib.blake2b(b"".join(map(_bytes, tensors)), digest_size=8).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
