"""A job that is asked to end writes a checkpoint between two steps, and every rank stops after the same step."""

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.resilience.random_state import random_states, restore_random_states
from lightspan.core.errors import UserError, printable
from lightspan.core.files.runs import CHECKPOINTS
from lightspan.training.checkpoints.manifest import LAST, last_checkpoint_note
from lightspan.training.checkpoints.pending_work import before_validation
from lightspan.training.signals import BUDGET_S, SignalFlag, installed, main_thread

PREEMPTED = 143
"""Default exit status: 128 + SIGTERM, which tells a scheduler that the job ended because it was asked to."""


class Preempted(SystemExit):
    """Ends the process with the status that requests a restart. `str` says why and where, for people."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Preemption(Callback):
    """On a signal to any rank: a checkpoint at the end of the optimiser step, then all ranks exit with `exit_code`.

    A handler only sets a flag. The flags of all ranks are combined once per optimiser step over a process group on the
    CPU (gloo: the run's own, or one more beside NCCL), begun at the end of one step and read at the end of the next: no
    rank waits for a device, nor for another rank longer than it does for the gradients. So all ranks stop one
    step after the flag reached any of them. Lightning's own handlers, which save and communicate inside the handler,
    are not used.

    The checkpoint is `last.ckpt` of the run's `Checkpoint`. A validation that is due at that step is left to the
    next start. One that has begun is stopped after the current batch, with a checkpoint of the step before it; the
    next start repeats all of it.

    Ctrl-C does the same, with status 130; a second Ctrl-C ends the run at once.

    Args:
        signals: names of signals to obey.
        budget_s: seconds from the signal to a complete checkpoint, > 0 and finite. After that, a rank that was
            signalled exits without one, wherever it is: in a step, a write, or waiting for data or other ranks. The
            previous checkpoint stays intact. Keep it below the time the scheduler allows (30 s on Kubernetes and for
            SIGTERM of SLURM, N for `--signal=USR1@N`).
        exit_code: status of every rank, in [1, 255]. Ranks that Lightning itself started exit with 0 instead, since it
            kills the run, rank 0 included, if one of them exits otherwise.
        requeue_on: signals after which rank 0 calls `scontrol requeue` once the checkpoint is complete, if
            SLURM_JOB_ID is set. SIGTERM is not among them by default: SLURM itself requeues what it preempts, and a
            job that its user cancels gets it too. A requeue ends the job, so all ranks ignore `signals` from then on.

    Raises: UserError for an unknown signal or a value out of range.
    """

    alters_training = False  # see config.identity

    def __init__(
        self,
        signals: Sequence[str] = ("SIGTERM", "SIGUSR1", "SIGUSR2"),
        budget_s: float = BUDGET_S,
        exit_code: int = PREEMPTED,
        requeue_on: Sequence[str] = ("SIGUSR1", "SIGUSR2"),
    ) -> None:
        if not 0 < budget_s < math.inf:
            raise UserError(
                f"budget_s={budget_s} must be above 0 seconds and finite; leave the callback out to save nothing"
            )
        if not 1 <= exit_code <= 255:
            raise UserError(
                f"exit_code={exit_code} must be in [1, 255]; 0 would tell the scheduler that the run has finished"
            )
        self.signals = _signals("signals", signals)
        self.requeue_on = _signals("requeue_on", requeue_on)
        self.budget_s, self.exit_code = budget_s, exit_code
        self._flag: SignalFlag | None = None
        self._group: Any = None
        self._exchange: tuple[Tensor, Any] | None = None
        self._step = 0
        self._shared_batches = 0.0  # of the current validation, as many as every rank has
        self._random_states: dict[str, Any] = {}  # before the validation
        self._leaving: tuple[signal.Signals, str] | None = None

    def obey(self, trainer: Trainer) -> None:
        """From here on this process handles signals as this callback describes. Lightning calls `setup`, which
        does the same, once all ranks have met.
        """
        self._flag = installed() or SignalFlag(())
        self._flag.budget_s, self._flag.late = self.budget_s, partial(self._give_up, trainer)
        self._flag.watch((*self.signals, signal.SIGINT))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.obey(trainer)
        # What other callbacks do after a step belongs in its checkpoint. A new list: Lightning is inside the old.
        within: Any = trainer  # whose callbacks a connector sets
        within.callbacks = sorted(
            within.callbacks, key=lambda one: (one is self) + 2 * isinstance(one, LightningCheckpoint)
        )
        # Lightning would replace the handlers by its own, which communicate from inside a handler and can hang.
        trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
        if trainer.world_size > 1:
            # A second gloo group would find the old addresses in a store that survives a restart by torchrun.
            on_cpu = dist.get_backend() == "gloo"
            self._group = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo")
        self._leaving = None
        self._begin_exchange()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._end_exchange()  # flags stay set, so the new exchange sees all that an older one saw
        self._begin_exchange()
        if (warning := self._read_exchange()) is not None:
            self._leaving = (warning[0], "before the first step")
            self._leave(trainer)
        self._begin_exchange()
        assert self._flag is not None
        self._flag.patient = True  # from here on there is a step to finish

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # inside an accumulation, whose gradients would be lost
        self._step = trainer.global_step
        warning = self._read_exchange()
        self._begin_exchange()
        finished = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        if warning is not None and not finished:
            self._leaving = (warning[0], self._save(trainer, *warning))

    # The step is logged between its end and these hooks, so the next run continues the log without a gap.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._leave(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._leave(trainer)
        self._random_states = random_states()
        self._shared_batches = _fewest(trainer, self._group)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # lightspan's loaders give all ranks equally many batches, a user's own may not: ranks agree only at
        # batches that all of them have.
        inside = batch_idx < self._shared_batches and dataloader_idx == 0
        if trainer.state.fn != TrainerFn.FITTING or not inside or trainer.fit_loop._should_accumulate():
            return
        warning = self._read_exchange()
        self._begin_exchange()
        if warning is None:
            return
        if trainer.sanity_checking:
            self._leaving = (warning[0], "before the first step")
        else:
            restore_random_states(self._random_states)
            with before_validation(trainer):
                self._leaving = (warning[0], self._save(trainer, *warning))
        self._leave(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_exchange()
        if self._flag is not None:
            self._flag.patient = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end_exchange()
        self._restore()

    def _restore(self) -> None:
        if self._flag is not None:
            self._flag.restore()
            self._flag = None

    def _begin_exchange(self) -> None:
        assert self._flag is not None
        received = self._flag.received
        # The age is sent too, plus 1 so that a flag is never 0: all ranks then agree on how much of the budget is left.
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
            self._begin_exchange()  # a single rank has nothing to wait for
        values = self._end_exchange()
        assert values is not None
        aged, number = values.tolist()
        return (signal.Signals(int(number)), aged - 1) if aged else None

    def _save(self, trainer: Trainer, received: signal.Signals, age_s: float) -> str:
        if age_s >= self.budget_s:
            over = f"the budget of {self.budget_s:g} s ran out before step {trainer.global_step} ended"
            return f"without a new checkpoint: {over}"
        assert self._flag is not None
        self._flag.tell(received, age_s)
        # Ours also waits for a background write; any other callback's folder gets a plain checkpoint.
        keeper, path = trainer.checkpoint_callback, _last_checkpoint(trainer)
        keeper.save_now(trainer) if isinstance(keeper, Checkpoint) else trainer.save_checkpoint(path)
        self._flag.met()
        return f"after step {trainer.global_step}"

    def _give_up(self, trainer: Trainer, received: signal.Signals) -> None:
        """Ends this process from the flag's thread: its main thread did not exit within the budget."""
        over = f"the budget of {self.budget_s:g} s ran out before a checkpoint of step {trainer.global_step} was whole"
        said = f"{received.name}: {over}, still {main_thread()}; {last_checkpoint_note(_last_checkpoint(trainer))}"
        print(printable(f"lightspan: {said}"), file=sys.stderr, flush=True)
        self._requeue(trainer, received)
        os._exit(self._status(trainer, received))

    def _leave(self, trainer: Trainer) -> None:
        if self._leaving is None:
            return
        received, when = self._leaving
        self._end_exchange()
        if self._job_after(received) is not None and self._flag is not None:
            self._flag.ignore()  # SLURM ends what it requeues, and would end this process during its teardown
        self._requeue(trainer, received)
        trainer.strategy.barrier("preempted")  # rank 0 has requested the restart before any rank exits
        why = "stopped by Ctrl-C" if received == signal.SIGINT else f"preempted by {received.name}"
        raise Preempted(self._status(trainer, received), f"{why} {when}")

    def _status(self, trainer: Trainer, received: signal.Signals) -> int:
        started_by_lightning = isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        outside = environment is None or environment.creates_processes_externally
        if started_by_lightning and not outside and trainer.local_rank != 0:
            return 0
        return 128 + received if received == signal.SIGINT else self.exit_code

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
        print(printable(f"lightspan: {said}"), file=sys.stderr, flush=True)


def _fewest(trainer: Trainer, group: Any) -> float:
    """Batches of the first loader of the validation that begins, on the rank with the fewest."""
    if group is None:
        return math.inf
    batches = torch.tensor(float(trainer.fit_loop.epoch_loop.val_loop.max_batches[0]), dtype=torch.float64)
    dist.all_reduce(batches, dist.ReduceOp.MIN, group=group)
    return float(batches) if math.isfinite(batches) else 0.0  # of unknown length: it is only left at its end


def _signals(argument: str, names: Sequence[str]) -> tuple[signal.Signals, ...]:
    refused = {"SIGKILL", "SIGSTOP", "SIGINT"}  # cannot be caught; Ctrl-C has its own meaning
    known = {number.name for number in signal.Signals} - refused
    for name in names:
        if name not in known:
            raise UserError(f"{argument}: {name!r} is not a signal that can be handled; choose from {sorted(known)}")
    return tuple(signal.Signals[name] for name in names)


def _last_checkpoint(trainer: Trainer) -> Path:
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(folder or Path(trainer.default_root_dir) / CHECKPOINTS) / LAST


def _slurm_job() -> str | None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    return job if re.fullmatch(r"\d+(_\d+)?", job) else None


def _nothing() -> None:
    """Stands in for the registration of Lightning's handlers."""
