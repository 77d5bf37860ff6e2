"""`lightspan fsck`: torn checkpoints go into quarantine and nowhere else, and the pointer ends on a whole one."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightspan.cli.main import main
from lightspan.training.checkpoints.io import WholeFileCheckpointIO
from lightspan.training.checkpoints.manifest import COMPLETE, FORMAT, LATEST, latest, seal_folder, set_latest


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
    set_latest(sharded)
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
    assert "whole (no manifest: check sums of its records)" in state_of(capsys.readouterr().out, "old.ckpt")


def test_a_folder_without_checkpoints_is_named(tmp_path, capsys):
    assert main(["fsck", str(tmp_path / "run")]) == 2
    assert "run/checkpoints' does not exist; name a run folder" in capsys.readouterr().err


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("x" * 200)


def marker(text: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "shard").write_bytes(b"x")
        (path / COMPLETE).write_text(text)

    return make


def marker_pipe(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / COMPLETE)


def archive(comment: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(b"PK\x05\x06" + bytes(16) + len(comment).to_bytes(2, "little") + comment)


STRANGE = {
    "a pipe": (fifo, "is a named pipe, not a regular file"),
    "a device": (device, "is a device, not a regular file"),
    "a loop of links": (loop, "cannot be read (Too many levels of symbolic links)"),
    "a dangling link": (dangling, "cannot be read (No such file or directory)"),
    "a deep manifest": (archive(b"[" * 60_000), "its manifest cannot be read"),
    "a deep marker": (marker("[" * 1_000_000), "its COMPLETE file cannot be read"),
    "a marker that is a list": (marker("[]"), "its COMPLETE file cannot be read"),
    "a marker of lists": (marker('{"format": 2, "files": {"shard": []}}'), "does not give the size and sum of shard"),
    "a marker that is a pipe": (marker_pipe, "has no COMPLETE file"),
    "no text at all": (marker("\0" * 9), "its COMPLETE file cannot be read"),
    "a format that is text": (marker('{"format": "x", "files": {}}'), "its COMPLETE file cannot be read"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_checkpoint_at_all_is_moved_without_being_waited_for(checkpoints, tmp_path, capsys, name):
    make, says = STRANGE[name]
    make(checkpoints / "strange.ckpt")
    assert main(["fsck", str(tmp_path)]) == 1
    assert says in state_of(capsys.readouterr().out, "strange.ckpt")
    assert os.path.lexists(checkpoints / "quarantine" / "strange.ckpt")
    assert latest(checkpoints) == checkpoints / "step=8.ckpt"
    assert main(["fsck", str(tmp_path)]) == 0


def test_a_marker_that_says_nothing_of_a_file_is_damage_though_it_sums_up(checkpoints, tmp_path, capsys):
    folder = checkpoints / "step=8.ckpt"
    for entry in ("text", None, ["x"], {}):
        (folder / COMPLETE).unlink(missing_ok=True)
        seal_folder(folder, {"format": FORMAT, "step": 8}, known={"shard": entry})
        main(["fsck", str(tmp_path), "--dry-run"])
        assert "is damaged: " in state_of(capsys.readouterr().out, "step=8.ckpt")


@pytest.mark.parametrize(
    "put",
    [fifo, device, loop, lambda p: p.write_text("x" * 5000), lambda p: p.write_bytes(b"\xff\0")],
    ids=["a pipe", "a device", "a loop", "5000 letters", "no text"],
)
def test_a_pointer_that_is_none_is_replaced(checkpoints, tmp_path, put):
    (checkpoints / LATEST).unlink()
    put(checkpoints / LATEST)
    assert main(["fsck", str(tmp_path)]) == 0
    assert latest(checkpoints) == checkpoints / "step=8.ckpt"


def test_a_whole_file_with_wrong_content_is_moved_with_the_entry_that_is_wrong(checkpoints, tmp_path, capsys):
    path = checkpoints / "step=9.ckpt"
    WholeFileCheckpointIO().save_checkpoint({"state_dict": {"w": "text"}, "global_step": 9}, path)
    set_latest(path)
    assert main(["fsck", str(tmp_path)]) == 1
    said = state_of(capsys.readouterr().out, "step=9.ckpt")
    assert "cannot be used: its entry state_dict.w is text, not a tensor" in said
    assert latest(checkpoints) == checkpoints / "step=8.ckpt"


def test_leftovers_with_odd_names_are_moved_too(checkpoints, tmp_path):
    (checkpoints / ".lightspan-x.old").write_text("not moved aside by lightspan")
    (checkpoints / ".lightspan-.tmp").write_text("")
    assert main(["fsck", str(tmp_path)]) == 1
    assert names(checkpoints / "quarantine") == {"lightspan-x.old", "lightspan-.tmp"}


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/quarantine"])
def test_a_link_out_of_the_run_is_refused_and_nothing_moves_through_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, link = tmp_path / "theirs", tmp_path / "run" / name
    theirs.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(theirs)
    (tmp_path / "run" / "checkpoints" / "torn.ckpt").write_text("torn")
    before = names(theirs)
    assert main(["fsck", str(tmp_path / "run")]) == 2
    assert f"{name} is a link" in capsys.readouterr().err
    assert names(theirs) == before
