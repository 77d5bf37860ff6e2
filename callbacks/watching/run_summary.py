"""summary.json: what a run reached and what it cost, in one flat file, and as a table at the end."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from lightspan.callbacks.watching.run_warnings import warnings_of
from lightspan.core.console import SafeConsole
from lightspan.core.errors import printable
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.places import RunPath
from lightspan.core.memory import MIB, parameter_counts, state_bytes
from lightspan.core.resident import peak_rss_bytes
from lightspan.training.loggers.jsonl import plain_number

WARM_UP_STEPS = 5


class RunSummary(Callback):
    """Writes `path` when training ends, also when it is interrupted (then with "finished": false).

    Keys: the last value of every logged metric, resumes included, "/" replaced by "_" (the table has the names as they
    were logged, which `--metric` wants); optimizer_state_mib;
    step_ms_median (optimiser steps from the start of their first micro-batch to the end of the step, summed over the
    micro-batches: no waiting for data, no validation, no checkpoint; the first 5 of a process dropped; of the last
    process that took a step; null before the first step);
    peak_rss_mib (this process, without data workers); peak_device_mib (CUDA only); parameters; trainable_parameters;
    steps; seconds (wall time of fit, summed over resumes); finished; warnings, a list of texts, if there were any and
    the run has a `JsonlLogger` (`lightspan.callbacks.watching.run_warnings`). NaN and infinities are written as null.
    In a run of several ranks all of this is rank 0's view.

    Args:
        path: the file, usually ${run}/summary.json.
        print_table: also print the summary when training finishes.
    """

    alters_training = False  # see config.identity

    def __init__(self, path: RunPath, print_table: bool = True) -> None:
        self.path = Path(path)
        self.print_table = print_table
        self._seconds_before = 0.0
        self._metrics_before: dict[str, Any] = {}
        self._step_ms_before: float | None = None
        self._trainer: Trainer | None = None
        self._started_s: float | None = None
        self._step = 0
        self._timer = StepTimer()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._started_s, self._trainer = time.monotonic(), trainer
            self._timer = StepTimer(pl_module.device.type == "cuda")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._timer.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._timer.stop(step_done=trainer.global_step > self._step)
        self._step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        summary = self._write(trainer, pl_module, finished=True)
        if self.print_table and trainer.is_global_zero:
            SafeConsole().print(summary_table(summary))
            print(printable(f"wrote {self.path}"))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._started_s is not None and trainer.global_step > 0:
            self._write(trainer, pl_module, finished=False)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds(), "metrics": self._metrics(), "step_ms": self._step_ms()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]
        self._metrics_before = state_dict.get("metrics", {})
        self._step_ms_before = state_dict.get("step_ms")

    def _metrics(self) -> dict[str, Any]:
        trainer = self._trainer
        now = {} if trainer is None else {**trainer.callback_metrics, **trainer.logged_metrics}
        return self._metrics_before | {name: plain_number(value) for name, value in now.items()}

    def _step_ms(self) -> float | None:
        mine = self._timer.median_ms()
        return self._step_ms_before if mine is None else mine

    def _seconds(self) -> float:
        return self._seconds_before + (time.monotonic() - self._started_s if self._started_s is not None else 0.0)

    def _write(self, trainer: Trainer, pl_module: LightningModule, finished: bool) -> dict[str, Any]:
        parameters, trainable = parameter_counts(pl_module)
        summary: dict[str, Any] = self._metrics()
        summary |= {
            "optimizer_state_mib": sum(map(state_bytes, trainer.optimizers)) / MIB,
            "step_ms_median": self._step_ms(),
            "peak_rss_mib": peak_rss_bytes() / MIB,
        }
        if pl_module.device.type == "cuda":
            summary["peak_device_mib"] = torch.cuda.max_memory_allocated(pl_module.device) / MIB
        summary |= {
            "parameters": parameters,
            "trainable_parameters": trainable,
            "steps": trainer.global_step,
            "seconds": round(self._seconds(), 3),
            "finished": finished,
        }
        if said := warnings_of(trainer):
            summary["warnings"] = said
        if trainer.is_global_zero:
            flat = {name.replace("/", "_"): value for name, value in summary.items()}
            write_atomic(self.path, json.dumps(flat, indent=2, allow_nan=False) + "\n")
        return summary


class StepTimer:
    """Times of optimiser steps in ms, each the sum over its micro-batches. On CUDA by events, which never wait."""

    def __init__(self, cuda: bool = False) -> None:
        self._cuda = cuda
        self._begun: Any = None
        self._parts: list[tuple[Any, Any]] = []
        self._unread: list[list[tuple[Any, Any]]] = []
        self._steps_ms: list[float] = []

    def start(self) -> None:
        self._begun = self._now()

    def stop(self, step_done: bool) -> None:
        self._parts.append((self._begun, self._now()))
        if step_done:
            self._unread.append(self._parts)
            self._parts = []
            # Events are read once the device has passed them, a few steps late, so that nothing waits for it.
            while self._unread and (not self._cuda or self._unread[0][-1][1].query()):
                self._read_first()

    def median_ms(self) -> float | None:
        """Median over the steps after the first WARM_UP_STEPS, over all if there are no more; None without steps."""
        if self._unread:
            torch.cuda.synchronize()
        while self._unread:
            self._read_first()
        steps_ms = self._steps_ms[WARM_UP_STEPS:] or self._steps_ms
        return statistics.median(steps_ms) if steps_ms else None

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read_first(self) -> None:
        parts = self._unread.pop(0)
        self._steps_ms.append(
            sum(begin.elapsed_time(end) if self._cuda else 1e3 * (end - begin) for begin, end in parts)
        )


def summary_table(summary: dict[str, Any]) -> Table:
    """The summary as two columns, numbers shortened to the digits that matter."""
    table = Table("", "", show_header=False)
    for name, value in summary.items():
        shown = "\n".join(value) if isinstance(value, list) else value
        table.add_row(name, f"{shown:.4g}" if isinstance(shown, float) else str(shown))
    return table
