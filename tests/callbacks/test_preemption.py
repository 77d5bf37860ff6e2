"""Real signals: what a job that is told to end leaves behind, and that the next start goes on as if nothing was."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import rank_processes
import torch
from lightning.pytorch import Callback
from rank_processes import callback
from waiting import HANG_S

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.resilience.preemption import PREEMPTED, Preempted, Preemption
from lightspan.callbacks.resilience.random_state import RandomState
from lightspan.core.errors import UserError
from lightspan.training.signals import WARNINGS, SignalFlag, installed, remembered


class Send(Callback):
    """A signal in the middle of a step's computation."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


def fit(make_trainer, net, batches, callbacks=(), preemption=None, ckpt_path=None, **options):
    module = net()
    trainer = make_trainer(
        **{"max_steps": 12, **options},
        enable_checkpointing=True,
        callbacks=[RandomState(0), preemption or Preemption(), *callbacks, Checkpoint()],
    )
    trainer.fit(module, batches(5), batches(2), ckpt_path=ckpt_path, weights_only=True)
    return module


def saved_step(tmp_path) -> int:
    return torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"]


@pytest.fixture
def keeps_ctrl_c():
    """A KeyboardInterrupt in `fit` makes Lightning ignore Ctrl-C for the rest of the process."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.sample(4)
@pytest.mark.parametrize("step", [0, 3, 4, 5, 8])
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}])
def test_a_signal_ends_the_step_and_the_next_start_ends_like_an_undisturbed_run(
    make_trainer, net, batches, tmp_path, step, options
):
    with pytest.raises(Preempted) as left:
        fit(make_trainer, net, batches, [Send(step)], **options)
    assert left.value.code == PREEMPTED == 143
    assert str(left.value) == f"preempted by SIGTERM after step {step + 1}"
    assert saved_step(tmp_path) == step + 1
    resumed = fit(make_trainer, net, batches, ckpt_path=tmp_path / "checkpoints/last.ckpt", **options)
    straight = fit(make_trainer, net, batches, default_root_dir=str(tmp_path / "straight"), **options)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), straight.parameters(), strict=True))


class Shrink(Callback):
    """Acts on the weights after each step."""

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        for parameter in pl_module.parameters():
            parameter.mul_(0.9)


def test_what_callbacks_behind_it_do_after_a_step_is_in_the_checkpoint(make_trainer, net, batches, tmp_path):
    with pytest.raises(Preempted):
        fit(make_trainer, net, batches, [Send(3), Shrink()])
    resumed = fit(make_trainer, net, batches, [Shrink()], ckpt_path=tmp_path / "checkpoints/last.ckpt")
    straight = fit(make_trainer, net, batches, [Shrink()], default_root_dir=str(tmp_path / "straight"))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), straight.parameters(), strict=True))


def test_an_accumulation_is_finished_first(make_trainer, net, batches, tmp_path):
    seen = []

    class Seen(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen.append(batch_idx)

    with pytest.raises(Preempted):  # the signal comes in micro-batch 0 or 1 of 2
        fit(make_trainer, net, batches, [Send(0), Seen()], accumulate_grad_batches=2)
    assert saved_step(tmp_path) == 1
    assert seen[:2] == [0, 1]


def test_a_signal_in_the_last_step_lets_the_run_finish(make_trainer, net, batches, tmp_path):
    fit(make_trainer, net, batches, [Send(3)], max_steps=4)
    assert saved_step(tmp_path) == 4


def test_signals_that_are_not_named_keep_their_meaning_and_the_named_get_theirs_back(make_trainer, net, batches):
    came = []
    before = signal.signal(signal.SIGUSR2, lambda *_: came.append("usr2"))
    sends = [Send(1, signal.SIGUSR2), Send(3, signal.SIGUSR1)]
    try:
        with pytest.raises(Preempted):
            fit(make_trainer, net, batches, sends, Preemption(["SIGUSR1"]))
        assert came == ["usr2"]
        assert signal.getsignal(signal.SIGUSR1) is signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_lightnings_handlers_stay_out(make_trainer, net, batches):
    handlers = []

    class Look(Callback):
        def on_train_batch_start(self, *_) -> None:
            handlers.append(signal.getsignal(signal.SIGTERM))

    fit(make_trainer, net, batches, [Look()], max_steps=2)
    assert all(isinstance(handler, SignalFlag) for handler in handlers)
    assert handlers


def test_a_flag_set_before_the_run_ends_it_before_its_first_step(make_trainer, net, batches, tmp_path):
    with remembered():
        os.kill(os.getpid(), signal.SIGUSR1)  # as while libraries load
        with pytest.raises(Preempted, match="preempted by SIGUSR1 before the first step"):
            fit(make_trainer, net, batches)
    assert not (tmp_path / "checkpoints").exists()
    assert installed() is None


def test_a_remembered_signal_that_nobody_obeys_does_what_it_would_have_done():
    came = []
    before = signal.signal(signal.SIGUSR1, lambda *_: came.append("default"))
    try:
        with remembered() as flag:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert (flag.received, came) == (signal.SIGUSR1, [])
            flag.release()
        assert came == ["default"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_forked_children_have_the_signals_blocked_and_the_parent_does_not():
    with remembered([signal.SIGTERM]):
        child = os.fork()
        if child == 0:
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            os._exit(0 if signal.SIGTERM in blocked else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.runs
@pytest.mark.smoke
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_process_whose_main_thread_never_comes_back_to_python_ends_all_the_same(name, status):
    code = f"""
import ctypes, os, signal, threading
from lightspan.training import signals as signal_flag
signal_flag.INTERRUPT_S = 0.2
with signal_flag.remembered((signal.SIGTERM, signal.SIGINT)) as flag:
    flag.budget_s = 0.2
    threading.Timer(0.1, os.kill, (os.getpid(), signal.{name})).start()
    mutex, lock = ctypes.create_string_buffer(128), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == status
    assert f"{name}: still in <module> (<string>:9); exiting at once" in done.stderr


def test_a_rank_that_was_told_of_a_signal_has_what_is_left_of_the_budget(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    with remembered([signal.SIGTERM]) as flag:
        flag.tell(signal.SIGTERM, age_s=flag.budget_s - 0.1)
        assert ended.wait(HANG_S)


def test_what_was_done_in_time_ends_nothing(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with remembered([signal.SIGTERM]) as flag:
        flag.budget_s = 1.0
        os.kill(os.getpid(), signal.SIGTERM)
        flag.met()
        time.sleep(1.2)
    assert ended == []


@pytest.mark.usefixtures("keeps_ctrl_c")
def test_ctrl_c_finishes_the_step_and_the_second_one_does_not(make_trainer, net, batches, tmp_path):
    with pytest.raises(Preempted, match="stopped by Ctrl-C after step 4") as left:
        fit(make_trainer, net, batches, [Send(3, signal.SIGINT)])
    assert left.value.code == 130
    assert saved_step(tmp_path) == 4
    with pytest.raises(SystemExit) as left:
        fit(make_trainer, net, batches, [Send(7, signal.SIGINT), Send(7, signal.SIGINT)])
    assert not isinstance(left.value, Preempted)
    assert saved_step(tmp_path) == 5  # of the end of the epoch before


def test_a_ctrl_c_that_somebody_else_takes_stays_theirs():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as shells start commands in the background
    try:
        with remembered([signal.SIGINT]):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


class Over(Preemption):
    """A flag that is older than the budget by the time the step ends."""

    def _read_exchange(self):
        warning = super()._read_exchange()
        return warning and (warning[0], warning[1] + 2 * self.budget_s)


def test_over_budget_before_the_step_ends_the_checkpoint_before_is_kept(make_trainer, net, batches, tmp_path):
    with pytest.raises(Preempted, match="without a new checkpoint: the budget of 60 s ran out before step 4 ended"):
        fit(make_trainer, net, batches, [Send(3)], Over(), val_check_interval=2)
    assert saved_step(tmp_path) == 2


@pytest.mark.usefixtures("keeps_ctrl_c")
def test_over_budget_while_writing_leaves_with_the_checkpoint_before(
    make_trainer, net, batches, tmp_path, monkeypatch, capsys
):
    left, statuses = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda status: (statuses.append(status), left.set()))

    class Stuck(Checkpoint):
        def on_save_checkpoint(self, trainer, *rest) -> None:
            if trainer.global_step == 4:
                assert left.wait(HANG_S)
                raise KeyboardInterrupt  # the process would be gone
            super().on_save_checkpoint(trainer, *rest)

    preemption = Preemption(budget_s=2)
    trainer = make_trainer(
        max_steps=9, enable_checkpointing=True, callbacks=[preemption, Send(3), Stuck(every_n_train_steps=3)]
    )
    with pytest.raises(SystemExit):
        trainer.fit(net(), batches(5))
    assert statuses == [PREEMPTED]
    err = capsys.readouterr().err
    assert "SIGTERM: the budget of 2 s ran out before a checkpoint of step 4 was whole, still in wait (" in err
    assert f"{tmp_path}/checkpoints/last.ckpt is whole" in err
    assert saved_step(tmp_path) == 3


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGUSR1, 0, "SLURM job 77 is requeued"),
        (signal.SIGUSR1, 1, "`scontrol requeue 77` failed: refused"),
        (signal.SIGTERM, 0, ""),
    ],
)
def test_slurm_is_asked_to_requeue_after_the_checkpoint(
    make_trainer, net, batches, tmp_path, monkeypatch, capsys, number, status, said
):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ntest -f {tmp_path}/checkpoints/last.ckpt || exit 9\n'
        f"echo refused >&2\nexit {status}\n"
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    before = {each: signal.getsignal(each) for each in WARNINGS}
    try:
        with pytest.raises(Preempted):
            fit(make_trainer, net, batches, [Send(2, number)])
        # A requeue ends the job: what is left of this process must not be ended by it, whatever the exit status.
        kept = signal.SIG_IGN if said else signal.SIG_DFL
        assert {signal.getsignal(each) for each in WARNINGS} == {kept}
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else None) == ("requeue 77\n" if said else None)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"signals": ["SIGKILL"]}, "signals: 'SIGKILL' is not a signal that can be handled"),
        ({"requeue_on": ["USR1"]}, "requeue_on: 'USR1' is not a signal"),
        ({"budget_s": 0}, "budget_s=0 must be above 0 seconds"),
        ({"budget_s": math.inf}, "budget_s=inf must be above 0 seconds and finite"),
        ({"budget_s": math.nan}, "budget_s=nan must be above 0 seconds and finite"),
        ({"exit_code": 0}, r"exit_code=0 must be in \[1, 255\]"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Preemption(**arguments)


# The command line, with real processes.


def weights(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.ranks
def test_rank_1_alone_is_signalled_with_its_workers_and_both_ranks_leave_in_step(tmp_path):
    run, workers = tmp_path / "a", "data.init_args.num_workers=1"
    warning = callback("signal", "tiny_lab.faults.SignalAt", step=5, name="SIGTERM", rank=1, children="true")
    left = rank_processes.fit(run, workers, *warning, ranks=2)
    assert left.statuses == [PREEMPTED, PREEMPTED], left.said
    assert "preempted by SIGTERM after step 7" in left.said  # the flag travels during the step after
    assert saved_step(run) == 7
    for folder in (run, tmp_path / "b"):
        again = rank_processes.fit(folder, workers, ranks=2)
        assert again.statuses == [0, 0], again.said
    resumed, straight = weights(run), weights(tmp_path / "b")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.ranks
def test_two_ranks_leave_a_validation_at_the_same_batch_and_run_all_of_it_later(tmp_path):
    validates = ["data.class_path=tiny_lab.parts.Rows", "trainer.limit_val_batches=1.0", "trainer.max_steps=8"]
    marker = tmp_path / "sent"
    warning = callback("warn", "tiny_lab.faults.SignalAt", step=4, name="SIGTERM", rank=1, validation="true")
    warning.append(f"trainer.callbacks.warn.init_args.marker={marker}")
    left = rank_processes.fit(tmp_path, *validates, *warning, ranks=2)
    assert left.statuses == [PREEMPTED, PREEMPTED], left.said
    assert "preempted by SIGTERM after step 4" in left.said
    assert saved_step(tmp_path) == 4
    assert rank_processes.fit(tmp_path, *validates, *warning, ranks=2).statuses == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/loss" in line] == [3, 7]


@pytest.mark.ranks
def test_a_rank_that_waits_for_others_in_vain_is_ended_by_a_warning(tmp_path):
    port = str(rank_processes.free_port())
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    warning = callback("warn", "tiny_lab.faults.WarnLater", name="SIGTERM", seconds=0.5)
    flags = ["--run", str(tmp_path), "trainer.devices=2", "trainer.strategy=ddp", *warning]
    budget = "trainer.callbacks.preemption.init_args.budget_s=1"
    ended = rank_processes.launch(["fit", *rank_processes.TINY, *flags, budget], 1, tmp_path, environment=place)
    assert ended.statuses == [PREEMPTED], ended.said
    assert "SIGTERM: the budget of 1 s ran out before a checkpoint of step 0 was whole, still in " in ended.said
