"""How fast a run is and how much memory it uses, measured over windows of steps."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightspan.callbacks.watching.detached import log_now
from lightspan.callbacks.watching.flops import FlopCount, peak_flops
from lightspan.core.batches import batch_type_of, rows_in
from lightspan.core.errors import UserError
from lightspan.core.memory import MIB
from lightspan.core.resident import rss_bytes


class Throughput(Callback):
    """Logs throughput/samples_per_s, throughput/tokens_per_s, throughput/waiting_for_data, throughput/flops_per_s,
    memory/rss_mib and, on CUDA, memory/device_peak_mib and throughput/mfu.

    They form a separate line at the end of each window, when the number of steps is a multiple of `every_n_steps`,
    also in a resumed run. Samples and tokens are counted over all ranks (every rank counted as busy as this one);
    tokens only if the batch is a mapping with "tokens" [B T+1], of which T are predicted. Time is wall time, waiting
    for data and writing checkpoints included, validation excluded. It waits for the device once per window, never in
    between.

    waiting_for_data is the share of that time, in [0, 1], in which this rank's process waited for its next batch, of a
    loader that counts it (`waited_s`, as lightspan's do). A GPU works on meanwhile, so it idles for that share at most:
    above a few hundredths, more `num_workers`, or views on the device, make the run faster.

    flops_per_s is the arithmetic of forward and backward passes on all ranks, as `FlopCount` counts it in the first
    micro-batch of a run, per sample, times samples_per_s. What activation checkpointing computes again is part of it.
    mfu is its share of what the GPUs could do at most in this precision, in [0, 1], on GPUs that `PEAKS` lists.
    A module with compiled parts is not counted, since counting would run them uncompiled.

    Args:
        every_n_steps: optimiser steps in a window, >= 1.
        flops_per_sample: instead of counting, such as of a compiled module; that of a run without compilation is
            flops_per_s / samples_per_s.
    """

    alters_training = False  # see config.identity

    def __init__(self, every_n_steps: int = 10, flops_per_sample: float | None = None) -> None:
        if every_n_steps < 1:
            raise UserError(f"every_n_steps={every_n_steps}: a window has at least 1 optimiser step")
        self.every_n_steps, self.flops_per_sample = every_n_steps, flops_per_sample
        self._count: FlopCount | None = None
        self._counted: int | None = None
        self._step, self._samples, self._tokens = 0, 0, 0
        self._restart(0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(trainer.global_step, _waited_s(trainer) or 0.0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Only in a run's first micro-batch, and never again in a resumed one, which finds the figure in its checkpoint.
        first = self.flops_per_sample is None and trainer.global_step == 0 and batch_idx == 0
        if first and not any(part._compiled_call_impl is not None for part in pl_module.modules()):
            self._count = FlopCount()
            self._count.__enter__()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.automatic_optimization:
            self._end_count()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end_count()

    def state_dict(self) -> dict[str, Any]:
        return {"flops_per_sample": self.flops_per_sample}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.flops_per_sample = self.flops_per_sample or state_dict["flops_per_sample"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._end_count()
        data = getattr(trainer, "datamodule", None)
        samples, tokens = batch_counts(batch, batch_type_of(data, pl_module))
        if self._counted is not None and samples:
            self.flops_per_sample, self._counted = self._counted / samples, None
        self._samples += samples * trainer.world_size
        self._tokens += tokens * trainer.world_size
        if trainer.global_step == self._step:
            return  # inside an accumulation
        self._step = trainer.global_step
        if self._step % self.every_n_steps:
            return
        on_cuda = pl_module.device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(pl_module.device)
        seconds = time.perf_counter() - self._began_s
        metrics = {"throughput/samples_per_s": self._samples / seconds, "memory/rss_mib": rss_bytes() / MIB}
        if (waited_s := _waited_s(trainer)) is not None:
            metrics["throughput/waiting_for_data"] = (waited_s - self._waited_s) / seconds
        if self.flops_per_sample:
            metrics["throughput/flops_per_s"] = self.flops_per_sample * metrics["throughput/samples_per_s"]
            if (peak := peak_flops(pl_module.device, str(trainer.precision))) is not None:
                metrics["throughput/mfu"] = metrics["throughput/flops_per_s"] / (peak * trainer.world_size)
        if self._tokens:
            metrics["throughput/tokens_per_s"] = self._tokens / seconds
        if on_cuda:
            metrics["memory/device_peak_mib"] = torch.cuda.max_memory_allocated(pl_module.device) / MIB
        log_now(trainer, metrics)
        self._restart(trainer.global_step, waited_s or 0.0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused_s = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began_s += time.perf_counter() - self._paused_s

    def _end_count(self) -> None:
        if self._count is not None:
            self._count.__exit__(None, None, None)
            self._counted, self._count = self._count.flops, None

    def _restart(self, step: int, waited_s: float) -> None:
        self._began_s = self._paused_s = time.perf_counter()
        self._waited_s = waited_s
        self._step, self._samples, self._tokens = step, 0, 0


def _waited_s(trainer: Trainer) -> float | None:
    return getattr(trainer.train_dataloader, "waited_s", None)


def batch_counts(batch: Any, batch_type: type | None = None) -> tuple[int, int]:
    """(samples, tokens) of a batch: see `lightspan.core.batches.rows_in`; and B T of "tokens" [B T+1], else 0."""
    tokens = batch.get("tokens") if isinstance(batch, Mapping) else None
    predicted = tokens.shape[0] * (tokens.shape[1] - 1) if isinstance(tokens, Tensor) and tokens.ndim == 2 else 0
    return rows_in(batch, batch_type), predicted
