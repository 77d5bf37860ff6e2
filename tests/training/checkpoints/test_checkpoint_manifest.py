"""A checkpoint that changed by one bit or lost one byte is found; the newest whole one is what a run goes on from."""

import copy
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.training.checkpoints.io import WholeFileCheckpointIO
from lightspan.training.checkpoints.manifest import (
    COMPLETE,
    FORMAT,
    LATEST,
    checkpoints,
    fault,
    header,
    latest,
    manifest,
    newest_whole,
    seal_file,
    seal_folder,
    set_latest,
)


def checkpoint(step: int) -> dict:
    stamp = {"loggers": {"a.Logger": "run-7"}, "random_states": [{}, {}]}
    return {"state_dict": {"w": torch.full((5, 7), step)}, "global_step": step, "lightspan": stamp}


def save(path: Path, step: int = 3) -> Path:
    WholeFileCheckpointIO().save_checkpoint(checkpoint(step), path)
    return path


def save_folder(path: Path, step: int = 3) -> Path:
    (path / "deep").mkdir(parents=True)
    (path / "deep" / "shard").write_bytes(bytes(range(200)))
    (path / "meta").write_bytes(b"abc")
    seal_folder(path, {"format": FORMAT, "step": step})
    return path


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_the_manifest_is_inside_and_tells_step_ranks_and_run_ids_without_torch(tmp_path):
    told = manifest(save(tmp_path / "a.ckpt"))
    assert {"format": FORMAT, "step": 3, "ranks": 2, "loggers": {"a.Logger": "run-7"}}.items() <= told.items()
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def rewritten(path: Path, compression: int, twice: bool = False) -> bytes:
    """The bytes of an archive with its records packed, or each of them twice at the same place."""
    made = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w", compression) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
        if twice:
            new.filelist += [copy.copy(record) for record in new.filelist]
            new._didModify = True
    return made.getvalue()


def sealed(content: bytes) -> bytes:
    """With a manifest that is right, as anybody can write one."""
    file = io.BytesIO(content)
    seal_file(file, header(checkpoint(3)), hashlib.sha256(content))
    return file.getvalue()


def test_archives_larger_in_memory_than_on_disk_are_refused_whatever_their_manifest_says(tmp_path):
    """torch unpacks them: a thousand times as much as the file has."""
    plain = tmp_path / "plain.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(2**14)}}, plain)
    assert fault(plain) is None
    stored = rewritten(plain, zipfile.ZIP_STORED)
    packed, twice = rewritten(plain, zipfile.ZIP_DEFLATED), rewritten(plain, zipfile.ZIP_STORED, twice=True)
    # Two lists of records, of which zipfile reads the second, and torch the first, whose place the end says.
    end = packed.rindex(b"PK\x05\x06")
    second = stored[stored.index(b"PK\x01\x02") :][: end - packed.index(b"PK\x01\x02")]
    both = packed[:end] + second + packed[end:]
    path = tmp_path / "a.ckpt"
    for make in (bytes, sealed):
        path.write_bytes(make(stored))
        assert fault(path) is None
        for content, what in ((packed, "compressed"), (twice, "overlap"), (both, "compressed")):
            path.write_bytes(make(content))
            for contents in (True, False):
                assert what in fault(path, contents).text


def test_torch_and_zip_read_the_file_as_if_there_were_no_manifest(tmp_path):
    path = save(tmp_path / "a.ckpt")
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["w"], torch.full((5, 7), 3))
    assert torch.load(path, weights_only=True, mmap=True)["global_step"] == 3
    assert zipfile.ZipFile(path).testzip() is None


def test_a_bit_flipped_anywhere_in_a_file_is_found(tmp_path):
    path = save(tmp_path / "a.ckpt")
    whole = path.read_bytes()
    assert fault(path) is None
    for at in range(0, len(whole), 7):
        flip(path, at)
        assert fault(path) is not None, at
        path.write_bytes(whole)


def test_a_file_cut_anywhere_is_found_also_without_reading_it(tmp_path):
    path = save(tmp_path / "a.ckpt")
    whole = path.read_bytes()
    for size in range(0, len(whole), 5):
        path.write_bytes(whole[:size])
        assert fault(path, contents=False) is not None
    path.write_bytes(whole + b"x")
    assert fault(path, contents=False) is not None


def test_a_file_of_format_1_is_checked_by_the_sums_of_its_archive(tmp_path):
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": {"w": torch.ones(1000)}}, path)
    assert (fault(path), manifest(path)) == (None, None)
    flip(path, path.read_bytes().index(b"\0\0\x80\x3f") + 40)
    assert "is damaged" in fault(path).text
    with pytest.raises(UserError, match=r"old.ckpt is damaged"):
        WholeFileCheckpointIO().load_checkpoint(path)


def test_a_damaged_file_is_not_loaded(tmp_path):
    path = save(tmp_path / "a.ckpt")
    # The name that a record bears in front of its content: torch and zip look at the list at the end only.
    flip(path, path.read_bytes().index(b"data.pkl"))
    assert torch.load(path, weights_only=True)
    with pytest.raises(UserError, match=r"a.ckpt is damaged: its content is not what its manifest says; give the path"):
        WholeFileCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("name", ["deep/shard", "meta"])
def test_a_changed_cut_or_missing_file_of_a_folder_is_named(tmp_path, name):
    path = save_folder(tmp_path / "a.ckpt")
    whole = (path / name).read_bytes()
    assert fault(path) is None
    flip(path / name, 2)
    assert fault(path).text == f"is damaged: {name} is not as the manifest says"
    assert fault(path, contents=False) is None
    (path / name).write_bytes(whole[:-1])
    assert name in fault(path, contents=False).text
    (path / name).unlink()
    assert fault(path, contents=False).text == f"is damaged: {name} is missing"


def test_a_folder_without_its_marker_or_with_half_of_it_is_torn(tmp_path):
    path = save_folder(tmp_path / "a.ckpt")
    half = (path / COMPLETE).read_text()[:-10]
    flip(path / COMPLETE, half.index("3"))  # the step
    assert "COMPLETE file has changed" in fault(path).text
    (path / COMPLETE).write_text(half)
    assert "COMPLETE file cannot be read" in fault(path).text
    (path / COMPLETE).unlink()
    assert "has no COMPLETE file" in fault(path).text


def test_newer_code_wrote_it_is_not_torn(tmp_path):
    path = save_folder(tmp_path / "a.ckpt")
    (path / COMPLETE).write_text(json.dumps({"format": FORMAT + 1, "lightspan": "9.9", "files": {}}))
    found = fault(path)
    assert not found.torn
    assert f"has format {FORMAT + 1} (written by lightspan 9.9)" in found.text


def test_checkpoints_come_by_step_and_not_by_time(tmp_path):
    for step in (4, 2, 10):
        save(tmp_path / f"step={step}.ckpt", step)
    torch.save({"state_dict": {}}, tmp_path / "format1.ckpt")
    os.utime(tmp_path / "step=2.ckpt", (2e9, 2e9))
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["step=10.ckpt", "step=4.ckpt", "step=2.ckpt", "format1.ckpt"]


def test_the_pointer_decides_and_a_torn_one_is_passed_over_with_its_reason(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path / f"step={step}.ckpt", step)
    assert newest_whole(tmp_path) == (tmp_path / "step=6.ckpt", {})
    set_latest(tmp_path / "step=4.ckpt")
    assert latest(tmp_path) == tmp_path / "step=4.ckpt"
    assert newest_whole(tmp_path) == (tmp_path / "step=4.ckpt", {})
    flip(tmp_path / "step=4.ckpt", 100)
    found, passed = newest_whole(tmp_path)
    assert found == tmp_path / "step=6.ckpt"
    assert "is damaged" in passed[tmp_path / "step=4.ckpt"].text


@pytest.mark.parametrize("content", ["", "../../etc/passwd", "gone.ckpt"])
def test_a_pointer_to_nothing_leads_nowhere_else(tmp_path, content):
    save(tmp_path / "a.ckpt")
    (tmp_path / LATEST).write_text(content)
    assert newest_whole(tmp_path)[0] == tmp_path / "a.ckpt"


def test_a_run_folder_is_told_from_a_checkpoint(tmp_path):
    (tmp_path / "resolved.yaml").write_text("")
    found = fault(tmp_path)
    assert found is not None
    assert "is a run folder, not a checkpoint" in str(found)
