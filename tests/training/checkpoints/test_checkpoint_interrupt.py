"""Ctrl-C inside a write is a Ctrl-C, and leaves the checkpoint before it and no half of the new one."""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightspan.core.errors import UserError
from lightspan.training.checkpoints.bytes import HashingWriter
from lightspan.training.checkpoints.folder import write_folder
from lightspan.training.checkpoints.io import WholeFileCheckpointIO, read_checkpoint

Save = Callable[[Path, int], None]


def save_file(path: Path, step: int) -> None:
    WholeFileCheckpointIO().save_checkpoint({"state_dict": {"w": torch.full((9,), step)}, "global_step": step}, path)


def save_folder(path: Path, step: int) -> None:
    write_folder({"state_dict": {"w": torch.full((9,), step)}}, {"global_step": step}, path)


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def raising_at(point: int, error: BaseException) -> Callable[[HashingWriter, bytes], int]:
    """A `HashingWriter.write` whose file raises at its write number `point`."""
    write, passed = HashingWriter.write, 0

    class File:
        def __init__(self, file: object) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            nonlocal passed
            passed += 1
            if passed == point:
                raise error
            return int(self.file.write(data))  # type: ignore[attr-defined]

    def counted(self: HashingWriter, data: bytes) -> int:
        kept, self._file = self._file, File(self._file)
        try:
            return write(self, data)
        finally:
            self._file = kept

    return counted


@pytest.mark.sample(1)
@pytest.mark.parametrize("save", [save_file, save_folder])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, os.strerror(errno.EIO))], ids=type)
def test_every_write_may_be_interrupted_or_fail(tmp_path, monkeypatch, save: Save, error: BaseException):
    path = tmp_path / "last.ckpt"
    save(path, 1)
    for point in range(1, 200):
        with monkeypatch.context() as patch:
            patch.setattr(HashingWriter, "write", raising_at(point, error))
            try:
                save(path, 2)
            except (KeyboardInterrupt, UserError) as raised:
                told = raised
            else:
                break
        if isinstance(error, OSError):
            assert f"cannot write {path}: the disk or network file system reports an error (Input/output error)" in str(
                told
            )
        else:
            assert type(told) is KeyboardInterrupt
        assert read_checkpoint(path)["global_step"] == 1
    assert point > 10
    assert read_checkpoint(path)["global_step"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


class Interrupts:
    """Raises between two writes, while it is pickled."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        raise KeyboardInterrupt


def test_an_interrupt_between_two_writes_is_one_too(tmp_path):
    path = tmp_path / "last.ckpt"
    save_file(path, 1)
    with pytest.raises(KeyboardInterrupt):
        WholeFileCheckpointIO().save_checkpoint({"state_dict": {}, "x": Interrupts(), "global_step": 2}, path)
    assert read_checkpoint(path)["global_step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_failing_sync_names_the_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save_file(path, 1)

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(UserError, match=f"^cannot write {path}: the disk or network file system reports an error"):
            save_file(path, 2)
    assert read_checkpoint(path)["global_step"] == 1
