"""A process killed at any point of a save leaves the checkpoint before it, or the new one, and nothing in between."""

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightspan.core.files.atomic import leftovers, put_back, remove_leftovers
from lightspan.training.checkpoints.bytes import HashingWriter
from lightspan.training.checkpoints.folder import read_folder, write_folder
from lightspan.training.checkpoints.io import WholeFileCheckpointIO
from lightspan.training.checkpoints.manifest import latest, newest_whole, set_latest

MOST_POINTS = 400


def content(step: int) -> dict:
    return {"state_dict": {"w": torch.full((3,), step)}, "global_step": step}


def save_file(path: Path, step: int) -> None:
    WholeFileCheckpointIO().save_checkpoint(content(step), path)
    set_latest(path)


def save_folder(path: Path, step: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        rest = content(step)
        write_folder({"state_dict": rest.pop("state_dict")}, rest, path)
    set_latest(path)


def killed_at(point: int, job: Callable[[], None]) -> bool:
    """Runs `job` in a child that kills itself before its write, fsync or rename number `point`; False if it lived."""
    child = os.fork()
    if child == 0:
        passed = 0

        def counted(function: Callable) -> Callable:
            def run(*args, **kwargs):
                nonlocal passed
                if passed == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                passed += 1
                return function(*args, **kwargs)

            return run

        try:
            for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
                setattr(os, name, counted(getattr(os, name)))
            HashingWriter.write = counted(HashingWriter.write)
            job()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.sweep
@pytest.mark.parametrize("save", [save_file, save_folder])
def test_every_point_of_a_save_leaves_a_whole_checkpoint_under_its_name(tmp_path, save):
    path = tmp_path / "last.ckpt"
    assert not killed_at(-1, lambda: save(path, 1))
    steps = []
    for point in range(MOST_POINTS):
        died = killed_at(point, lambda: save(path, 2))
        put_back(tmp_path)
        found, passed = newest_whole(tmp_path)
        # Also where last.ckpt itself is being replaced there is never a torn one to pass over.
        assert (found, passed, latest(tmp_path)) == (path, {}, path), point
        checkpoint = read_folder(path) if path.is_dir() else WholeFileCheckpointIO().load_checkpoint(path)
        assert checkpoint["state_dict"]["w"].tolist() == [checkpoint["global_step"]] * 3
        steps.append(checkpoint["global_step"])
        if not died:
            break
        if steps[-1] == 2:  # so that every later point is tried from the old state too
            assert not killed_at(-1, lambda: save(path, 1))
    assert not died
    assert len(steps) > 10
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (1, 2)
    remove_leftovers(tmp_path)
    assert leftovers(tmp_path) == []
    assert newest_whole(tmp_path)[0] == path


@pytest.mark.sweep
def test_a_save_under_a_new_name_moves_the_pointer_last(tmp_path):
    old, new = tmp_path / "step=1.ckpt", tmp_path / "step=2.ckpt"
    assert not killed_at(-1, lambda: save_file(old, 1))
    seen = []
    for point in range(MOST_POINTS):
        died = killed_at(point, lambda: save_file(new, 2))
        found, passed = newest_whole(tmp_path)
        assert passed == {}
        seen.append((new.exists(), found == new))
        if not died:
            break
    assert sorted(set(seen)) == [(False, False), (True, False), (True, True)]
    assert seen == sorted(seen)
