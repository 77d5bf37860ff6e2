"""Where the time and the memory of some steps go."""

import gzip
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from lightspan.core.errors import UserError, printable
from lightspan.core.files.atomic import atomic_path, make_folder, write_atomic
from lightspan.core.files.places import RunPath

ROWS = 40
MOST_EVENTS = 100_000
"""Allocations in a memory snapshot, the newest."""


class Profile(Callback):
    """Records the optimiser steps `first` to `last` with torch.profiler. Every rank writes into `folder`:

    trace-rank-R.json.gz: what ran when, on CPU and GPU; open it with https://ui.perfetto.dev or chrome://tracing.
    operators-rank-R.txt: the operators that took longest.
    memory-rank-R.pickle: on CUDA, who allocated what; open it with https://docs.pytorch.org/memory_viz. It is a pickle,
        since that page reads nothing else; lightspan never loads it.

    Steps take longer while they are recorded; their results are the same.

    Args:
        folder: usually ${run}/profile.
        first: optimiser steps before the first one recorded, counted from the start of this process, >= 0.
        last: the first one not recorded any more, > first.
    """

    alters_training = False  # see config.identity

    def __init__(self, folder: RunPath, first: int = 5, last: int = 8) -> None:
        if not 0 <= first < last:
            raise UserError(f"steps {first}:{last} of a profile must be A:B with 0 <= A < B")
        self.folder, self.first, self.last = Path(folder), first, last
        self._started_at = 0
        self._profiler: profile | None = None
        self._done = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started_at = trainer.global_step
        make_folder(self.folder)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._done or self._profiler is not None or trainer.global_step - self._started_at < self.first:
            return
        on_cuda = pl_module.device.type == "cuda"
        if on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]
        self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profiler.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step - self._started_at >= self.last:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)
        if not self._done and trainer.is_global_zero:
            taken = trainer.global_step - self._started_at
            print(
                printable(f"no profile: this run took {taken} steps, and the first to be recorded is {self.first}"),
                flush=True,
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        """Ends the recording, if there is one, and writes it."""
        recorded, self._profiler = self._profiler, None
        if recorded is None:
            return
        self._done = True
        recorded.stop()
        rank, on_cuda = trainer.global_rank, module.device.type == "cuda"
        if on_cuda:
            with atomic_path(self.folder / f"memory-rank-{rank}.pickle") as temporary:
                torch.cuda.memory._dump_snapshot(str(temporary))
            torch.cuda.memory._record_memory_history(enabled=None)
        with atomic_path(self.folder / f"trace-rank-{rank}.json.gz") as temporary:
            plain = temporary.with_suffix(".json")
            try:
                recorded.export_chrome_trace(str(plain))
                with plain.open("rb") as file, gzip.open(temporary, "wb") as packed:
                    shutil.copyfileobj(file, packed)
            finally:
                plain.unlink(missing_ok=True)
        table = recorded.key_averages().table(
            sort_by="self_cuda_time_total" if on_cuda else "self_cpu_time_total", row_limit=ROWS
        )
        write_atomic(self.folder / f"operators-rank-{rank}.txt", table + "\n")
        if trainer.is_global_zero:
            print(printable(f"profile of steps {self.first} to {self.last - 1}: {self.folder}"), flush=True)
