"""Byte text: which files are read, how they are split, and what a batch holds."""

import hashlib
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightspan.core.errors import UserError
from lightspan.core.files.folders import find_files
from lightspan.datamodules.text.windows import ByteText, Windows, in_validation, text_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 files of 100 bytes each, all of one letter pair, and things that must not be read."""
    root = tmp_path / "corpus"
    for i in range(40):
        path = root / f"d{i % 3}" / f"{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([65 + i % 26, 97 + i // 26]) * 50)
    (root / "notes.md").write_bytes(b"#" * 100)
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "x.py").write_bytes(b"!" * 100)
    return root


def test_windows_do_not_overlap_and_miss_only_the_tail() -> None:
    windows = Windows(np.arange(10, dtype=np.uint8), 3)
    tokens = [windows.sample(i, seed=i)["tokens"] for i in range(len(windows))]
    assert [t.tolist() for t in tokens] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert tokens[0].dtype == torch.int64


def test_batches_have_the_documented_shape(folder: Path) -> None:
    data = ByteText([str(folder)], context=16, batch_size=4, val_fraction=0.25)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert list(batch) == ["tokens"]
    assert batch["tokens"].shape == (4, 17)
    assert batch["tokens"].dtype == torch.int64
    assert 0 <= batch["tokens"].min() <= batch["tokens"].max() < data.vocab_size


def test_the_split_is_by_file_and_no_validation_text_is_trained_on(folder: Path) -> None:
    data = ByteText([str(folder)], context=9, val_fraction=0.25)
    data.setup()
    names = [name for name, _ in find_files(folder, (".py",), frozenset())]
    held_out = {name for name in names if in_validation(name, 0.25)}
    assert 0 < len(held_out) < 20
    assert data.train is not None
    assert data.val is not None
    sides = [{tuple(pair) for w in side.windows for pair in pairwise(w)} for side in (data.train, data.val)]
    marks = [{pair for pair in side if min(pair) > 64 and pair[0] < 97} for side in sides]
    assert all(marks)
    assert not marks[0] & marks[1]


def test_the_text_is_the_files_in_sorted_order_with_a_zero_byte_between(folder: Path) -> None:
    data = ByteText([str(folder)], context=1, val_fraction=0.25)
    data.setup()
    kept = [p for name, p in find_files(folder, (".py",), frozenset({"__pycache__"})) if not in_validation(name, 0.25)]
    assert [str(p) for p in kept] == sorted(map(str, kept))
    assert data.train is not None
    text = b"\0".join(path.read_bytes() for path in kept)
    assert data.train.windows.tobytes() == text[: len(text) // 2 * 2]


def test_the_split_of_a_file_is_the_same_on_every_machine() -> None:
    share = int.from_bytes(hashlib.sha256(b"json/decoder.py").digest()[:8], "big") / 2**64
    assert in_validation("json/decoder.py", share + 1e-9)
    assert not in_validation("json/decoder.py", share - 1e-9)
    assert [name for name in map("{}.py".format, range(60)) if in_validation(name, 0.05)] == [
        "8.py",
        "27.py",
        "35.py",
        "43.py",
        "46.py",
    ]


@given(fraction=st.floats(0.1, 0.9))
def test_the_held_out_share_of_files_is_the_fraction(fraction: float) -> None:
    held_out = sum(in_validation(f"{i}.txt", fraction) for i in range(2000)) / 2000
    assert abs(held_out - fraction) < 0.06  # five deviations of the binomial


def test_validation_reads_fixed_evenly_spaced_windows(folder: Path) -> None:
    data = ByteText([str(folder)], context=4, batch_size=3, val_fraction=0.25, val_windows=10)
    data.setup()
    assert data.val is not None
    loader = data.val_dataloader()
    gaps = np.diff(loader.indices)
    assert len(loader.indices) == 10
    assert gaps.max() - gaps.min() <= 1
    first, second = (torch.cat([batch["tokens"] for batch in loader]) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, torch.from_numpy(data.val.windows[loader.indices].astype(np.int64)))
    data.val_windows = 10**6
    assert data.val_dataloader().indices.tolist() == list(range(len(data.val)))


def test_links_caches_and_other_endings_are_not_read(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.py").write_text("secret")
    (folder / "link.py").symlink_to(outside / "secret.py")
    (folder / "twin.py").symlink_to(folder / "d0" / "0.py")
    (folder / "linked_folder").symlink_to(outside)
    names = [name for name, _ in find_files(folder, (".py",), frozenset({"__pycache__"}))]
    assert len(names) == 40
    assert not any("link" in name or "twin" in name or "cache" in name for name in names)
    assert [name for name, _ in find_files(folder, (".md", ".rst"), frozenset())] == ["notes.md"]


def test_the_standard_library_is_read_without_its_tests_and_installed_packages() -> None:
    names = [name for name, _ in text_files(None, (".py",))]
    assert {"json/decoder.py", "argparse.py", "asyncio/events.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert len(names) > 400
    root = Path(os.__file__).resolve().parent
    assert all((root / name).is_file() for name in names)


def test_binary_and_unreadable_files_are_skipped_and_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "binary.py").write_bytes(b"MZ\0\0" * 100)
    (folder / "locked.py").write_bytes(b"x" * 100)
    before = os.open

    def guarded(path: str | Path, *more: int, **settings: int) -> int:
        if Path(path).name == "locked.py":  # permissions do not stop root, who may run this test
            raise PermissionError(13, "Permission denied")
        return before(path, *more, **settings)

    monkeypatch.setattr(os, "open", guarded)
    data = ByteText([str(folder)], context=9, val_fraction=0.25)
    data.setup()
    message = capsys.readouterr().out
    assert message.startswith("text:")
    assert "2 binary or unreadable files skipped" in message
    assert "windows of 10 bytes" in message
    assert data.train is not None
    assert not (data.train.windows == ord("x")).any()


def test_files_may_be_named_one_by_one_whatever_their_ending(tmp_path: Path) -> None:
    paths = []
    for i in range(20):
        paths.append(tmp_path / f"{i}.log")
        paths[-1].write_bytes(b"abc" * 20)
    data = ByteText([str(path) for path in paths], context=8, val_fraction=0.3)
    data.setup()
    assert data.train is not None
    assert data.val is not None
    assert len(data.train) + len(data.val) > 100


def test_a_folder_without_a_matching_file_is_named_with_the_endings_and_the_way_out(folder: Path) -> None:
    with pytest.raises(UserError, match=r"corpus contains no file ending in \.c or \.h; .*init_args\.paths.*suffixes"):
        ByteText([str(folder)], suffixes=(".c", ".h")).setup()


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text path \S+none does not exist; correct data\.init_args\.paths"):
        ByteText([str(tmp_path / "none")]).setup()


@pytest.mark.parametrize("name", ["/dev/zero", "pipe"])
def test_a_path_that_would_never_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(UserError, match=rf"text path {name} is (a device|a named pipe), not a regular file"):
        ByteText([name]).setup()


def test_an_empty_file_is_a_text_of_no_bytes(tmp_path: Path) -> None:
    for name, content in (("a.py", b""), ("b.py", b"ab"), ("c.py", b"")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "8.py").write_bytes(b"held out")  # by the hash of its name
    data = ByteText([str(tmp_path)], context=1)
    data.setup()
    assert data.train is not None
    assert data.train.windows.tobytes() == b"\0ab\0"


def test_too_little_text_says_how_much_there_is(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    with pytest.raises(UserError, match=r"too little training text: 5 bytes in 1 files .* context \+ 1 = 257 bytes"):
        ByteText([str(tmp_path)], val_fraction=1e-9).setup()
    (tmp_path / "a.py").write_text("x = 1\n" * 100)
    with pytest.raises(UserError, match=r"too little validation text: 0 bytes in 0 files .*change val_fraction"):
        ByteText([str(tmp_path)], val_fraction=1e-9).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context=0 tokens is too short"),
        ({"val_fraction": 0.0}, r"val_fraction=0.0 is outside \(0, 1\)"),
        ({"val_fraction": 1.0}, r"val_fraction=1.0 is outside \(0, 1\)"),
        ({"val_windows": 0}, "val_windows=0 leaves nothing to validate on"),
        ({"paths": []}, "paths is an empty list"),
        ({"suffixes": ()}, "suffixes is empty"),
        ({"paths": [""]}, "paths names an empty text"),
    ],
)
def test_impossible_settings_are_refused_at_once(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ByteText(**arguments)
