"""What a checkpoint costs: one write for all its names, and one look by one rank before it is loaded."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lightspan.callbacks.resilience.writer as writer_module
from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.core.errors import UserError
from lightspan.training.checkpoints import manifest as checkpoint_manifest
from lightspan.training.checkpoints.io import WholeFileCheckpointIO
from lightspan.training.checkpoints.manifest import fault, newest_whole

WIDTH = 40_000  # so that a checkpoint is some megabytes, and all else is small beside it


def counted(field: str) -> int:
    """Bytes that this process has read (rchar) or written (wchar) so far, through any library."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())[field])


@pytest.fixture
def fit(make_trainer, net, batches, tmp_path):
    def run(steps: int = 2, width: int = WIDTH, **options: Any) -> Path:
        checkpoint = Checkpoint(every_n_train_steps=2, save_top_k=-1, **options)
        make_trainer(max_steps=steps, enable_checkpointing=True, callbacks=[checkpoint]).fit(net(width), batches(5))
        return tmp_path / "checkpoints"

    return run


@pytest.mark.parametrize("in_background", [False, True])
def test_two_names_of_one_step_are_written_once(fit, in_background):
    before = counted("wchar")
    folder = fit(in_background=in_background)
    written, size = counted("wchar") - before, (folder / "last.ckpt").stat().st_size
    assert size > 10 * WIDTH
    assert written < 1.2 * size
    assert (folder / "last.ckpt").samefile(folder / "step=2.ckpt")


def test_a_later_save_leaves_the_other_name_as_it_was(fit):
    folder = fit(steps=5, width=8)
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in folder.glob("*.ckpt")}
    assert steps == {"last.ckpt": 5, "step=2.ckpt": 2, "step=4.ckpt": 4}
    assert all(fault(path) is None for path in folder.glob("*.ckpt"))


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_where_no_links_are_made_the_file_is_copied(fit, monkeypatch, code):
    def refused(*args: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refused)
    folder = fit(width=8)
    assert not (folder / "last.ckpt").samefile(folder / "step=2.ckpt")
    assert (folder / "last.ckpt").read_bytes() == (folder / "step=2.ckpt").read_bytes()


def test_a_link_that_fails_names_its_file_and_the_last_whole_one(fit, monkeypatch):
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", full)
    message = r"^cannot write .*/last.ckpt: the disk or network .*the last whole checkpoint is .*/step=2.ckpt$"
    with pytest.raises(UserError, match=message):
        fit(width=8)


def test_a_resumed_checkpoint_is_read_twice_by_the_first_rank_to_verify_and_to_load(fit):
    folder = fit()
    size = (folder / "last.ckpt").stat().st_size
    before = counted("rchar")
    path, _ = newest_whole(folder)
    assert path is not None
    WholeFileCheckpointIO().load_checkpoint(path)
    assert counted("rchar") - before < 2.2 * size


def test_every_other_rank_reads_it_once_and_takes_the_choice_of_the_first(fit, monkeypatch):
    folder = fit(steps=4)
    chosen = folder / "step=2.ckpt"
    size = chosen.stat().st_size
    monkeypatch.setattr("lightspan.training.checkpoints.io.rank", lambda: 1)
    before = counted("rchar")
    path, _ = newest_whole(folder, contents=False)
    assert path is not None
    io = WholeFileCheckpointIO(broadcast=lambda mine: (chosen, None))
    assert io.load_checkpoint(path)["global_step"] == 2
    assert counted("rchar") - before < 1.2 * size
    with pytest.raises(UserError, match=r"^what the first rank found$"):
        WholeFileCheckpointIO(broadcast=lambda mine: (chosen, "what the first rank found")).load_checkpoint(path)


def test_what_changed_since_it_was_chosen_is_verified_again(fit):
    folder = fit(width=8)
    path, _ = newest_whole(folder)
    assert path is not None
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replaced = path.with_name("new")
    replaced.write_bytes(content)
    replaced.rename(path)
    with pytest.raises(UserError, match="its content is not what its manifest says"):
        WholeFileCheckpointIO().load_checkpoint(path)


def test_a_verdict_is_used_once(fit, monkeypatch):
    folder = fit(width=8)
    path, _ = newest_whole(folder)
    assert path is not None
    looks: list[Path] = []
    digest: Callable[..., Any] = checkpoint_manifest._digest
    monkeypatch.setattr(checkpoint_manifest, "_digest", lambda file, end: (looks.append(file), digest(file, end))[1])
    WholeFileCheckpointIO().load_checkpoint(path)
    assert looks == []
    WholeFileCheckpointIO().load_checkpoint(path)
    assert looks == [path]


def test_a_strategy_that_writes_by_itself_gets_no_links(make_trainer, net, batches, tmp_path, monkeypatch):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class WritesByItself(SingleDeviceStrategy):
        def save_checkpoint(self, checkpoint, filepath, storage_options=None) -> None:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    linked: list[Path] = []
    monkeypatch.setattr(writer_module, "link_atomic", lambda source, path: linked.append(path))
    checkpoint = Checkpoint(every_n_train_steps=2)
    trainer = make_trainer(
        max_steps=2, enable_checkpointing=True, callbacks=[checkpoint], strategy=WritesByItself(device="cpu")
    )
    trainer.fit(net(), batches(5))
    assert linked == []
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
