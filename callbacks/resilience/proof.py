"""What `lightspan prove-resume` adds to its runs: a trace of what each step saw, and an early end."""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightspan.core.batches import batch_type_of, fields_of
from lightspan.core.collate import separated
from lightspan.core.errors import UserError
from lightspan.core.files.places import RunPath


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

    def __init__(self, folder: RunPath) -> None:
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
        batch_type = batch_type_of(getattr(trainer, "datamodule", None), pl_module)
        self._batch, self._samples = trainer.fit_loop.epoch_loop.total_batch_idx, sample_digests(batch, batch_type)

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
            "buffers": {name: _digest(buffer) for name, buffer in pl_module.named_buffers() if name not in stored},
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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises: UserError for a run that is over before these steps, which would prove less than was asked for."""
        if trainer.global_step < self.steps and not trainer.received_sigterm:
            raise UserError(
                f"the run is over after {trainer.global_step} steps, before the {self.steps} that --steps asks for; "
                f"raise trainer.max_epochs={trainer.max_epochs}, or lower --steps"
            )


def sample_digests(batch: Any, batch_type: type | None = None) -> list[str]:
    """One digest for each sample of a batch: of its bytes in the fields that the type declares, and of that row in all
    other tensors with the samples on the first axis, which are all tensors of a batch without a type.
    """
    declared = separated(batch, batch_type) if isinstance(batch, Mapping) and batch_type is not None else []
    names = fields_of(batch_type) if declared else {}
    others = {name: value for name, value in batch.items() if name not in names} if declared else batch
    tensors = _tensors(others)
    rows = len(declared) or (len(tensors[0]) if tensors and tensors[0].ndim else 0)
    tensors = [tensor for tensor in tensors if tensor.ndim and len(tensor) == rows]
    return [
        _digest(*_tensors(declared[i] if declared else ()), *(tensor[i] for tensor in tensors)) for i in range(rows)
    ]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _digest(*tensors: Tensor) -> str:
    return hashlib.blake2b(b"".join(map(_bytes, tensors)), digest_size=8).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
