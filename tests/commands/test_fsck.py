"""`lightspan fsck`: torn checkpoints go into quarantine and nowhere else, and the pointer ends on a whole one."""

from pathlib import Path

import pytest
import torch

from lightspan.callbacks.checkpoint_io import WholeFileCheckpointIO
from lightspan.callbacks.checkpoint_manifest import COMPLETE, FORMAT, LATEST, latest, point_latest, seal_folder
from lightspan.cli import main


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Files of steps 2, 4 and 6, a folder of step 8, all whole; the pointer names the last."""
    folder = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        content = {"state_dict": {"w": torch.full((9,), step)}, "global_step": step}
        WholeFileCheckpointIO().save_checkpoint(content, folder / f"step={step}.ckpt")
    sharded = folder / "step=8.ckpt"
    sharded.mkdir()
    (sharded / "shard").write_bytes(b"abcdef")
    seal_folder(sharded, {"format": FORMAT, "step": 8})
    point_latest(sharded)
    return folder


def damage(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return bytes(content)


def state_of(output: str, name: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith(f"{name} ")]
    return line


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_whole_checkpoints_are_told_with_step_and_size_and_left_alone(checkpoints, tmp_path, capsys):
    before = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    assert main(["fsck", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert state_of(out, "step=4.ckpt").split()[1] == "4"
    assert state_of(out, "step=8.ckpt").endswith(f"whole  <- {LATEST}")
    assert "4 whole, 0 torn" in out
    assert {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()} == before


def test_torn_ones_are_moved_unchanged_and_the_pointer_goes_to_the_newest_whole_one(checkpoints, tmp_path, capsys):
    flipped = damage(checkpoints / "step=6.ckpt")
    (checkpoints / "step=8.ckpt" / COMPLETE).unlink()
    assert main(["fsck", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "its content is not what its manifest says" in state_of(out, "step=6.ckpt")
    assert "has no COMPLETE file" in state_of(out, "step=8.ckpt")
    assert f"{LATEST} now names step=4.ckpt" in out
    assert names(checkpoints) == {"step=2.ckpt", "step=4.ckpt", LATEST, "quarantine"}
    assert latest(checkpoints) == checkpoints / "step=4.ckpt"
    assert (checkpoints / "quarantine" / "step=6.ckpt").read_bytes() == flipped
    assert (checkpoints / "quarantine" / "step=8.ckpt" / "shard").read_bytes() == b"abcdef"
    assert main(["fsck", str(tmp_path)]) == 0


def test_two_torn_ones_of_one_name_are_both_kept(checkpoints, tmp_path):
    for content in (b"first", b"second"):
        (checkpoints / "step=4.ckpt").write_bytes(content)
        assert main(["fsck", str(tmp_path)]) == 1
    kept = {path.name: path.read_bytes() for path in (checkpoints / "quarantine").iterdir()}
    assert kept == {"step=4.ckpt": b"first", "step=4.ckpt.2": b"second"}


def test_a_dry_run_tells_and_moves_nothing(checkpoints, tmp_path, capsys):
    damage(checkpoints / "step=6.ckpt")
    before = names(checkpoints)
    assert main(["fsck", str(tmp_path), "--dry-run"]) == 1
    assert "3 whole, 1 torn, nothing moved" in capsys.readouterr().out
    assert names(checkpoints) == before


def test_what_a_killed_process_left_is_out_of_the_way_and_what_it_moved_aside_is_back(checkpoints, tmp_path):
    (checkpoints / ".lightspan-00-last.ckpt.tmp").write_text("half")
    (checkpoints / "step=8.ckpt").rename(checkpoints / ".lightspan-0f-step=8.ckpt.old")
    assert main(["fsck", str(tmp_path)]) == 1
    assert latest(checkpoints) == checkpoints / "step=8.ckpt"
    assert (checkpoints / "step=8.ckpt" / "shard").exists()
    assert names(checkpoints / "quarantine") == {"lightspan-00-last.ckpt.tmp"}


@pytest.mark.parametrize("content", [None, "gone.ckpt\n"])
def test_a_missing_or_dangling_pointer_is_mended_without_calling_anything_torn(checkpoints, tmp_path, content):
    (checkpoints / LATEST).unlink()
    if content:
        (checkpoints / LATEST).write_text(content)
    assert main(["fsck", str(tmp_path)]) == 0
    assert latest(checkpoints) == checkpoints / "step=8.ckpt"


def test_one_of_a_newer_format_is_not_moved(checkpoints, tmp_path, capsys):
    (checkpoints / "step=8.ckpt" / COMPLETE).write_text('{"format": 99, "lightspan": "9.9", "files": {}}')
    assert main(["fsck", str(tmp_path)]) == 0
    assert "upgrade lightspan" in state_of(capsys.readouterr().out, "step=8.ckpt")
    assert (checkpoints / "step=8.ckpt").exists()


def test_a_file_of_format_1_counts_as_whole_by_its_check_sums(checkpoints, tmp_path, capsys):
    torch.save({"state_dict": {}}, checkpoints / "old.ckpt")
    assert main(["fsck", str(tmp_path)]) == 0
    assert "whole (format 1: check sums of its records, no manifest)" in state_of(capsys.readouterr().out, "old.ckpt")


def test_a_folder_without_checkpoints_is_named(tmp_path, capsys):
    assert main(["fsck", str(tmp_path / "run")]) == 2
    assert "run/checkpoints' does not exist; name a run folder" in capsys.readouterr().err
