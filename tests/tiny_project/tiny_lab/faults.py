"""What goes wrong in a run, on purpose and at an exact place; and rows that a resumed run takes up where it left."""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor, nn

from lightspan.datamodules.loading.ranks import train_loader


class _Rows:
    def __init__(self, poisoned: int | None) -> None:
        self.rows = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        if poisoned is not None:
            self.rows[poisoned] = torch.nan

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, seed: int) -> Tensor:
        return self.rows[index]


class ExactRows(LightningDataModule):
    """64 rows in an exact order over any number of ranks; the row `poisoned`, if any, is NaN."""

    def __init__(self, batch_size: int = 8, num_workers: int = 0, poisoned: int | None = None) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.poisoned = batch_size, num_workers, poisoned

    def train_dataloader(self) -> Any:
        return train_loader(_Rows(self.poisoned), self.batch_size, 0, self.num_workers, self.trainer)


class SignalAt(Callback):
    """Sends a signal to this very process, or to all its children too, while it computes step `step` on rank `rank`, or
    in the third batch of the validation after that many steps.

    With `marker`, a file that is made first, it does so once and not again in a restarted run.
    """

    alters_training = False

    def __init__(
        self,
        step: int,
        name: str,
        rank: int = 0,
        marker: str | None = None,
        children: bool = False,
        validation: bool = False,
    ) -> None:
        self.validation = validation
        self.step, self.number, self.rank, self.children = step, signal.Signals[name], rank, children
        self.marker = None if marker is None else Path(marker)

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if not self.validation:
            self._send(trainer)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.validation and batch_idx == 2:
            self._send(trainer)

    def _send(self, trainer) -> None:
        if (trainer.global_step, trainer.global_rank) != (self.step, self.rank):
            return
        if self.marker is not None:
            if self.marker.exists():
                return
            self.marker.touch()
        if self.children:
            for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
                os.kill(int(child), self.number)
        os.kill(os.getpid(), self.number)


class SignalParentAt(Callback):
    """Sends a signal to the process that started this run, while it computes step `step`, unless `marker` exists, which
    it makes first.
    """

    alters_training = False

    def __init__(self, step: int, name: str, marker: str) -> None:
        self.step, self.number, self.marker = step, signal.Signals[name], Path(marker)

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if trainer.global_step == self.step and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getppid(), self.number)
            if self.number == signal.SIGKILL:  # the next step comes after what the kernel sends then
                while os.getppid() == int(os.environ["LIGHTSPAN_PARENT"]):
                    time.sleep(0.01)
            else:
                time.sleep(0.5)


class LoseNode(Callback):
    """SIGKILL to the launcher of the last of `ranks` ranks and to that rank itself, while it computes step `step`."""

    alters_training = False

    def __init__(self, step: int, ranks: int = 2) -> None:
        self.step, self.ranks = step, ranks

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        last = trainer.global_rank == trainer.world_size - 1
        if (trainer.global_step, trainer.world_size) == (self.step, self.ranks) and last:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


class WarnLater(Callback):
    """A signal to this process some seconds after the callback was built, wherever the run is by then."""

    alters_training = False

    def __init__(self, name: str, seconds: float) -> None:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.Signals[name])).start()


class HangAt(Callback):
    """Rank `rank` stops at step `step` for good; with `holds_interpreter` none of its threads runs any more."""

    alters_training = False

    def __init__(self, step: int, rank: int = 0, holds_interpreter: bool = False) -> None:
        self.step, self.rank, self.holds_interpreter = step, rank, holds_interpreter

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
            stuck_on_purpose(self.holds_interpreter)


def stuck_on_purpose(holds_interpreter: bool) -> None:
    if holds_interpreter:
        ctypes.PyDLL(None).sleep(3600)  # PyDLL: a call that keeps the interpreter's lock
    time.sleep(3600)


class Logarithm(nn.Module):
    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD.log()


class Downwards(nn.Module):
    """Positive numbers times a weight that falls, and their logarithm: below `floor` they are raised to it."""

    def __init__(self, floor: float | None = None) -> None:
        super().__init__()
        self.weight, self.logarithm, self.floor = nn.Parameter(torch.ones(3)), Logarithm(), floor

    def forward(self, x_B4: Tensor) -> Tensor:
        y_B3 = (1 + x_B4[:, :3].square()) * self.weight
        return self.logarithm(y_B3 if self.floor is None else y_B3.clamp_min(self.floor))
