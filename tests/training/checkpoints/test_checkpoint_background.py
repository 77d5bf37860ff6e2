"""Writing in the background changes when a checkpoint is written, never what is in it, and hides no error."""

import errno
import os
import threading

import pytest
import torch
from lightning.pytorch import Callback

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.resilience.random_state import RandomState
from lightspan.core.errors import UserError
from lightspan.training.checkpoints import io as checkpoint_io
from lightspan.training.checkpoints.background import Background, staged
from lightspan.training.checkpoints.manifest import fault, latest

TIMEOUT_S = 120


def leaves(value, path=""):
    if isinstance(value, dict):
        for key, child in value.items():
            yield from leaves(child, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, child in enumerate(value):
            yield from leaves(child, f"{path}[{i}]")
    else:
        yield path, value


def assert_same_content(a, b):
    first, second = ({**dict(leaves(torch.load(path, weights_only=True)))} for path in (a, b))
    assert first.keys() == second.keys()
    for name, value in first.items():
        if name.endswith(("path", "dirpath")):
            continue
        same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert same, name


def fit(make_trainer, net, batches, folder, steps=6, callbacks=(), **options):
    checkpoint = Checkpoint(every_n_train_steps=2, **options)
    trainer = make_trainer(
        max_steps=steps,
        enable_checkpointing=True,
        callbacks=[RandomState(seed=1), *callbacks, checkpoint],
        default_root_dir=str(folder),
    )
    trainer.fit(net(), batches(10))
    return folder / "checkpoints"


class LetsWritesGo(Callback):
    """Sets `event` once the training of a given step has begun."""

    def __init__(self, step: int) -> None:
        self.step, self.event = step, threading.Event()

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            self.event.set()


def test_the_file_holds_the_step_it_was_taken_at_though_it_is_written_steps_later(
    make_trainer, net, batches, tmp_path, monkeypatch
):
    plain = fit(make_trainer, net, batches, tmp_path / "plain", save_top_k=-1)
    goes, write, late = LetsWritesGo(step=3), checkpoint_io._write, []

    def held(checkpoint, path):
        assert goes.event.wait(TIMEOUT_S), "training waited for the write"
        late.append(path.name)
        write(checkpoint, path)

    monkeypatch.setattr(checkpoint_io, "_write", held)
    options = {"save_top_k": -1, "in_background": True, "callbacks": [goes]}
    background = fit(make_trainer, net, batches, tmp_path / "background", **options)
    assert late == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]  # last.ckpt is a second name of each
    names = sorted(path.name for path in plain.glob("*.ckpt"))
    assert names == ["last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    for name in names:
        assert fault(background / name) is None
        assert_same_content(plain / name, background / name)


def test_the_pointer_moves_and_the_old_one_goes_only_after_the_new_one_is_written(
    make_trainer, net, batches, tmp_path, monkeypatch
):
    write, seen = checkpoint_io._write, []
    goes = LetsWritesGo(step=5)

    def held(checkpoint, path):
        if path.name == "step=4.ckpt":
            assert goes.event.wait(TIMEOUT_S)
            seen.append((latest(path.parent).name, (path.parent / "step=2.ckpt").exists()))
        write(checkpoint, path)

    monkeypatch.setattr(checkpoint_io, "_write", held)
    folder = fit(make_trainer, net, batches, tmp_path, in_background=True, callbacks=[goes])
    assert seen == [("last.ckpt", True)]
    assert latest(folder).name == "last.ckpt"
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["last.ckpt", "step=6.ckpt"]


@pytest.mark.parametrize("step", [2, 6])
def test_an_error_in_the_thread_surfaces_at_the_next_save_or_the_end_with_its_path(
    make_trainer, net, batches, tmp_path, monkeypatch, step
):
    replace = os.replace

    def full(source, target) -> None:
        if f"step={step}" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    kept = "there is no checkpoint yet" if step == 2 else "the last whole checkpoint is .*last.ckpt"
    with pytest.raises(UserError, match=rf"step={step}.ckpt: the disk is full .*{kept}"):
        fit(make_trainer, net, batches, tmp_path, in_background=True)
    if step == 6:
        assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
        assert (tmp_path / "checkpoints" / "step=4.ckpt").exists()


def test_a_run_that_fails_by_itself_ends_by_its_own_error_with_a_note_of_the_write(
    make_trainer, net, batches, tmp_path, monkeypatch
):
    class Fails(Callback):
        def on_train_batch_start(self, trainer, *args) -> None:
            if trainer.global_step == 3:
                raise ZeroDivisionError

    def full(checkpoint, path):
        raise UserError(f"cannot write {path}: the disk is full")

    monkeypatch.setattr(checkpoint_io, "_write", full)
    with pytest.raises(ZeroDivisionError) as caught:
        fit(make_trainer, net, batches, tmp_path, in_background=True, callbacks=[Fails()])
    assert any("step=2.ckpt: the disk is full" in note for note in caught.value.__notes__)


def test_jobs_behind_a_failed_one_are_dropped_until_it_was_told(tmp_path):
    background, done = Background(), []

    def fails() -> None:
        raise OSError(errno.EIO, "Input/output error")

    background.submit(tmp_path / "a", fails)
    background.submit(tmp_path / "b", lambda: done.append("b"))
    with pytest.raises(UserError, match=r"writing checkpoint .*/a in the background failed: OSError"):
        background.wait()
    background.submit(tmp_path / "c", lambda: done.append("c"))
    background.wait()
    assert done == ["c"]
    background.close()
    background.submit(tmp_path / "d", lambda: done.append("d"))
    assert done == ["c", "d"]


def test_staged_tensors_share_memory_among_themselves_and_with_nothing_else():
    weight = torch.arange(6.0)
    copy = staged({"a": weight, "b": weight.view(2, 3), "plain": [1, "x", (None, 2.5)]})
    weight.zero_()
    assert copy["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copy["a"].data_ptr() == copy["b"].data_ptr()
    assert copy["plain"] == [1, "x", (None, 2.5)]
