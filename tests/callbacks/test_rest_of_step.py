"""A run killed anywhere between a checkpoint and what Lightning does after it: the next start does that first."""

import contextlib
import json
import os
import signal
import time

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer import call
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.resilience.preemption import Preempted, Preemption
from lightspan.callbacks.resilience.random_state import RandomState
from lightspan.callbacks.watching.run_summary import RunSummary
from lightspan.training.loggers.jsonl import JsonlLogger

HOOKS = (
    *("on_train_batch_end", "on_validation_start", "on_validation_batch_end", "on_validation_end"),
    *("on_train_epoch_end", "on_train_end"),
)


class Killed(BaseException):
    """Stands in for SIGKILL."""


class Tripwire:
    """Notes the places that a run passes, and kills it at one of them."""

    def __init__(self, fatal: int | None = None) -> None:
        self.fatal, self.passed = fatal, []

    def __call__(self, place: str) -> None:
        self.passed.append(place)
        if len(self.passed) - 1 == self.fatal:
            raise Killed(place)


class KillingLogger(DummyLogger):
    """Asked before the others, so that the line is lost."""

    def __init__(self, pass_by: Tripwire) -> None:
        super().__init__()
        self._pass_by = pass_by

    def log_metrics(self, metrics, step=None) -> None:
        self._pass_by(f"log {step}")


class Products(Callback):
    """What a method hands out: one file an epoch and one at the end of training."""

    def __init__(self, folder, pass_by: Tripwire) -> None:
        self.folder, self._pass_by = folder, pass_by

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        (self.folder / f"epoch-{trainer.current_epoch}").write_text("")
        pl_module.log("probe/accuracy", float(trainer.current_epoch))

    def on_train_end(self, trainer, pl_module) -> None:
        self._pass_by("before the product")
        (self.folder / f"product-{trainer.global_step}").write_text("")


@pytest.fixture
def start(make_trainer, net, batches, monkeypatch):
    """One start in a folder, from its last checkpoint where there is one; returns the places it passed."""

    def start(folder, options, saves, fatal: int | None = None, callbacks=()) -> list[str]:
        folder.mkdir(exist_ok=True)
        pass_by, module, last = Tripwire(fatal), net(), folder / "checkpoints" / "last.ckpt"
        for hook in HOOKS:
            setattr(module, hook, lambda *_, hook=hook: pass_by(hook))
        saver = Checkpoint(dirpath=str(folder / "checkpoints"), **saves)
        summary = RunSummary(str(folder / "summary.json"), print_table=False)
        trainer = make_trainer(
            enable_checkpointing=True,
            logger=[KillingLogger(pass_by), JsonlLogger(str(folder))],
            callbacks=[RandomState(0), *callbacks, Products(folder, pass_by), summary, saver],
            default_root_dir=str(folder),
            **options,
        )
        validation = DataLoader(list(batches(2)), None)
        with contextlib.suppress(Killed), monkeypatch.context() as patch:
            if fatal is not None:
                patch.setattr(call, "_interrupt", lambda *_: None)  # nothing of a killed process runs on
            trainer.fit(module, batches(3), validation, ckpt_path=last if last.exists() else None, weights_only=True)
        return pass_by.passed

    return start


def left_by(folder):
    """(figures, products, summary, everything in the last checkpoint but what is measured) of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time_s"]
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("seconds", "step_ms_median", "peak_rss_mib"):
        summary[name] = summary[name] > 0
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    for name in ("seconds", "step_ms"):
        del checkpoint["callbacks"]["RunSummary"][name]
    return lines, files, summary, told(checkpoint, str(folder))


def told(value, folder: str):
    """What can be compared by ==, with tensors as lists and the run's own folder left out of paths."""
    if isinstance(value, dict):
        return {told(key, folder): told(item, folder) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [told(item, folder) for item in value]
    return value.replace(folder, "") if isinstance(value, str) else value


BY_STEPS = {"max_steps": 5, "val_check_interval": 2}, {"every_n_train_steps": 1}
BY_EPOCHS = {"max_epochs": 2}, {"every_n_train_steps": 3}
AT_VALIDATIONS = {"max_steps": 5, "val_check_interval": 2}, {}
BY_A_METRIC = {"max_steps": 5, "val_check_interval": 2}, {"monitor": "val/loss_nats", "every_n_train_steps": 1}


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("run", "first", "last"),
    [(BY_STEPS, 5, 5), (BY_EPOCHS, 3, 4), (BY_EPOCHS, 6, 6), (AT_VALIDATIONS, 5, 5), (BY_A_METRIC, 5, 5)],
    ids=["the last step and its validation", "the end of an epoch", "the last epoch", "saved at validations", "ranked"],
)
def test_killed_anywhere_from_one_step_to_another_it_ends_as_the_straight_run(start, tmp_path, run, first, last):
    places = start(tmp_path / "straight", *run)
    straight = left_by(tmp_path / "straight")
    steps = [number for number, place in enumerate(places) if place == "on_train_batch_end"]
    for fatal in range(steps[first - 1], steps[last] if last < len(steps) else len(places)):
        killed = tmp_path / f"killed-{fatal}"
        assert start(killed, *run, fatal)[-1] == places[fatal]
        start(killed, *run)
        assert left_by(killed) == straight, (fatal, places[fatal])


@pytest.mark.parametrize("run", [BY_STEPS, BY_EPOCHS, AT_VALIDATIONS, BY_A_METRIC])
def test_a_run_that_ended_ends_once_more_and_leaves_the_same(start, tmp_path, run):
    start(tmp_path / "run", *run)
    before, last = left_by(tmp_path / "run"), tmp_path / "run" / "checkpoints" / "last.ckpt"
    written = last.stat()
    start(tmp_path / "run", *run)
    assert left_by(tmp_path / "run") == before
    assert (last.stat().st_ino, last.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


@pytest.mark.parametrize("step", [2, 5])
def test_a_warning_in_a_validation_leaves_at_once_and_the_next_start_runs_all_of_it(start, tmp_path, step):
    class Warn(Callback):
        def on_validation_batch_start(self, trainer, *rest) -> None:
            if trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)

    run = {"max_steps": 5, "val_check_interval": 2}, {"every_n_train_steps": 3}
    with pytest.raises(Preempted, match=f"preempted by SIGTERM after step {step}"):
        start(tmp_path / "run", *run, callbacks=[Warn(), Preemption()])
    start(tmp_path / "run", *run, callbacks=[Preemption()])
    start(tmp_path / "straight", *run, callbacks=[Preemption()])
    *told_by_it, stopped = left_by(tmp_path / "run")
    *told_by_straight, straight = left_by(tmp_path / "straight")
    assert told_by_it == told_by_straight
    # At the last step the checkpoint that the warned process wrote inside its validation stays, with that moment's log
    # and random states.
    for part in ("state_dict", "optimizer_states", "global_step", "epoch"):
        assert stopped[part] == straight[part], part


def test_tensorboard_hides_what_was_logged_after_the_checkpoint(make_trainer, net, batches, tmp_path):
    def fit(steps: int, ckpt_path=None) -> None:
        logger = TensorBoardLogger(str(tmp_path), name="tensorboard", version="")
        saver = Checkpoint(every_n_train_steps=3, save_top_k=-1)
        trainer = make_trainer(max_steps=steps, logger=logger, enable_checkpointing=True, callbacks=[saver])
        trainer.fit(net(), batches(9), ckpt_path=ckpt_path, weights_only=True)

    fit(5)
    ended = int(time.time())
    while int(time.time()) == ended:  # files of one second are read in the order of "9" and "10" as words
        time.sleep(0.05)
    fit(4, tmp_path / "checkpoints" / "step=3.ckpt")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss_nats")] == [0, 1, 2, 2, 3]
