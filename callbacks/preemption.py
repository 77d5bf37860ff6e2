"""A job that is told to end writes a checkpoint between two steps, and every rank leaves at the same one."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor

from lightspan.callbacks.checkpoint import Checkpoint
from lightspan.callbacks.signal_flag import SignalFlag, installed
from lightspan.errors import UserError

PREEMPTED = 143
"""Default exit status: 128 + SIGTERM, what a scheduler sees of a job that ended because it was asked to."""
LAST = "last.ckpt"


class Preempted(SystemExit):
    """Ends the process with the status that asks for a new start. `str` tells what was kept, for people."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Preemption(Callback):
    """On a signal to any rank: a checkpoint at the end of the optimiser step, then all ranks leave with `exit_code`.

    A handler only sets a flag. The flags of all ranks are combined once an optimiser step over a process group on the
    CPU (gloo: the run's own, or one more beside NCCL), begun at the end of one step and read at the end of the next: no
    device is waited for, and no rank waits for another longer than it does for the gradients. So all ranks leave one
    step after the flag reached any of them. Lightning's own handlers, which save and communicate inside the handler,
    stay out.

    The checkpoint is `last.ckpt` of the run's `Checkpoint`. A validation that is due at that very step is left out.

    Args:
        signals: names of signals to obey.
        budget_s: seconds from the signal to a whole checkpoint, > 0. When they are over the ranks leave without one;
            the checkpoint before stays whole. Keep it below the time the scheduler leaves (30 s on Kubernetes and for
            SIGTERM of SLURM, N for `--signal=USR1@N`).
        exit_code: status of every rank, in [1, 255]. Ranks that Lightning itself started end with 0 instead, since it
            kills the run, rank 0 included, when one of them ends otherwise.
        requeue_on: signals after which rank 0 calls `scontrol requeue` once the checkpoint is whole, where
            SLURM_JOB_ID is set. SIGTERM is not among them by default: SLURM itself requeues what it preempts so, and a
            job that its user cancels gets it too. A requeue ends the job, so all ranks ignore `signals` from then on.

    Raises: UserError for an unknown signal or a value out of range.
    """

    alters_training = False  # see config.identity

    def __init__(
        self,
        signals: Sequence[str] = ("SIGTERM", "SIGUSR1", "SIGUSR2"),
        budget_s: float = 60.0,
        exit_code: int = PREEMPTED,
        requeue_on: Sequence[str] = ("SIGUSR1", "SIGUSR2"),
    ) -> None:
        if not budget_s > 0:
            raise UserError(f"budget_s={budget_s} must be above 0 seconds; leave the callback out to save nothing")
        if not 1 <= exit_code <= 255:
            raise UserError(f"exit_code={exit_code} must be in [1, 255]; 0 would tell the scheduler that all is done")
        self.signals = _signals("signals", signals)
        self.requeue_on = _signals("requeue_on", requeue_on)
        self.budget_s, self.exit_code = budget_s, exit_code
        self._flag: SignalFlag | None = None
        self._group: Any = None
        self._exchange: tuple[Tensor, Any] | None = None
        self._step = 0
        self._leaving: tuple[signal.Signals, str] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._flag = installed() or SignalFlag(())
        self._flag.watch(self.signals)
        # Lightning would replace the handlers by its own, which communicate from inside a handler and can hang.
        trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
        if trainer.world_size > 1:
            # A second gloo group would meet, in a store that outlives a restart by torchrun, the addresses of before.
            on_cpu = dist.get_backend() == "gloo"
            self._group = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._leaving = trainer.global_step, None
        self._begin_exchange()
        if (warning := self._read_exchange()) is not None:
            self._leaving = (warning[0], "before the first step")
            self._leave(trainer)
        self._begin_exchange()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # inside an accumulation: its gradients would be lost
        self._step = trainer.global_step
        warning = self._read_exchange()
        self._begin_exchange()
        finished = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        if warning is not None and not finished:
            self._leaving = (warning[0], self._save(trainer, *warning))

    # The step is logged between its end and these, so the next run continues the log without a gap.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._leave(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_exchange()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._flag is not None:
            self._flag.restore()
            self._flag = None

    def _begin_exchange(self) -> None:
        assert self._flag is not None
        received = self._flag.received
        # The age rides along, plus 1 so that a flag is never 0: all ranks then agree on how much of the budget is left.
        values = torch.zeros(2, dtype=torch.float64)
        if received is not None:
            values = torch.tensor([1 + self._flag.age_s(), received], dtype=torch.float64)
        work = None
        if self._group is not None:
            work = dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._exchange = (values, work)

    def _end_exchange(self) -> Tensor | None:
        if self._exchange is None:
            return None
        (values, work), self._exchange = self._exchange, None
        if work is not None:
            work.wait()
        return values

    def _read_exchange(self) -> tuple[signal.Signals, float] | None:
        """(signal, its age in seconds at the exchange), the same on all ranks, or None."""
        if self._group is None:
            self._begin_exchange()  # alone, there is nobody to wait for
        values = self._end_exchange()
        assert values is not None
        aged, number = values.tolist()
        return (signal.Signals(int(number)), aged - 1) if aged else None

    def _save(self, trainer: Trainer, received: signal.Signals, age_s: float) -> str:
        path, left_s = _last_checkpoint(trainer), self.budget_s - age_s
        over = f"the budget of {self.budget_s:g} s was over"
        if left_s <= 0:
            return f"without a new checkpoint: {over} before step {trainer.global_step} ended"

        def give_up() -> None:
            print(
                f"lightspan: {received.name}: {over} before the checkpoint of step {trainer.global_step} was whole; "
                f"{_standing(path)}",
                file=sys.stderr,
                flush=True,
            )
            self._requeue(trainer, received)
            os._exit(self._status(trainer))  # the main thread is inside the write

        timer = threading.Timer(left_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            # Ours also waits for a write in the background; any other callback's folder gets a plain checkpoint.
            keeper = trainer.checkpoint_callback
            keeper.save_now(trainer) if isinstance(keeper, Checkpoint) else trainer.save_checkpoint(path)
        finally:
            timer.cancel()
        return f"after step {trainer.global_step}"

    def _leave(self, trainer: Trainer) -> None:
        if self._leaving is None:
            return
        received, when = self._leaving
        self._end_exchange()
        if self._job_after(received) is not None and self._flag is not None:
            self._flag.ignore()  # SLURM ends what it requeues, and would end this process in its teardown
        self._requeue(trainer, received)
        trainer.strategy.barrier("preempted")  # rank 0 has asked for the new start before any rank is gone
        raise Preempted(
            self._status(trainer), f"preempted by {received.name} {when}; {_standing(_last_checkpoint(trainer))}"
        )

    def _status(self, trainer: Trainer) -> int:
        started_by_lightning = isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        outside = environment is None or environment.creates_processes_externally
        return 0 if started_by_lightning and not outside and trainer.local_rank != 0 else self.exit_code

    def _job_after(self, received: signal.Signals) -> str | None:
        """The SLURM job to requeue after this signal."""
        return _slurm_job() if received in self.requeue_on else None

    def _requeue(self, trainer: Trainer, received: signal.Signals) -> None:
        job = self._job_after(received)
        if job is None or not trainer.is_global_zero:
            return
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=30)
            failure = done.stderr.strip() or f"status {done.returncode}" if done.returncode else None
        except (OSError, subprocess.TimeoutExpired) as error:
            failure = str(error)
        said = f"SLURM job {job} is requeued" if failure is None else f"`scontrol requeue {job}` failed: {failure}"
        print(f"lightspan: {said}", file=sys.stderr, flush=True)


def _signals(argument: str, names: Sequence[str]) -> tuple[signal.Signals, ...]:
    refused = {"SIGKILL", "SIGSTOP", "SIGINT"}  # cannot be caught; Ctrl-C has its own meaning
    known = {number.name for number in signal.Signals} - refused
    for name in names:
        if name not in known:
            raise UserError(f"{argument}: {name!r} is no signal that can be obeyed; name some of {sorted(known)}")
    return tuple(signal.Signals[name] for name in names)


def _last_checkpoint(trainer: Trainer) -> Path:
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(folder or Path(trainer.default_root_dir) / "checkpoints") / LAST


def _standing(path: Path) -> str:
    return f"{path} is whole" if path.exists() else "there is no checkpoint yet, a new start begins from the first step"


def _slurm_job() -> str | None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    return job if re.fullmatch(r"\d+(_\d+)?", job) else None


def _nothing() -> None:
    """Stands in for the registration of Lightning's handlers."""
