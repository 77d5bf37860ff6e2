"""`lightspan data`: what is packed comes back, whole or not at all, and damage is found down to the sample."""

import json
import shutil
import subprocess
from itertools import chain
from pathlib import Path

import pytest
from PIL import Image
from shard_files import damage

from lightspan.cli import main
from lightspan.commands.data import parse_size
from lightspan.datamodules import pack as packing
from lightspan.datamodules.pack import sources
from lightspan.datamodules.shards import Shards
from lightspan.errors import UserError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of 7 and 5 pictures; picture n of class c is red n, green c."""
    folder = tmp_path / "pictures"
    for number, (name, count) in enumerate((("cats", 7), ("dogs", 5))):
        (folder / name / "more").mkdir(parents=True)
        for i in range(count):
            path = folder / name / ("more" if i % 2 else ".") / f"{i}.png"
            Image.new("RGB", (4, 4), (i, number, 0)).save(path)
    (folder / ".hidden").write_text("not packed")
    return folder


def read(folder: Path) -> list[tuple[int, int, int]]:
    """(red, green, label) of each sample that training sees in one epoch, sorted."""
    data = Shards([packing.pattern(folder)], batch_size=12, mean=(0, 0, 0), std=(1, 1, 1))
    data.setup()
    (batch,) = data.train_dataloader()
    pixels = (batch["image"][:, :2, 0, 0] * 255).round().int()
    return sorted((*pixel, label) for pixel, label in zip(pixels.tolist(), batch["label"].tolist(), strict=True))


def test_an_image_folder_becomes_shards_that_training_reads(pictures: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "packed"
    assert main(["data", "pack", str(pictures), "--out", str(out), "--shard-size", "5K"]) == 0
    shards = sorted(path.name for path in out.glob("*.tar"))
    assert len(shards) > 3
    printed = capsys.readouterr().out
    assert f"12 samples of 2 classes in {len(shards)} shards, members ['png', 'cls']" in printed
    assert f"data.init_args.shards=[{out}/{{00000..{shards[-1][:5]}}}.tar]" in printed
    assert read(out) == sorted([(i, 0, 0) for i in range(7)] + [(i, 1, 1) for i in range(5)])
    assert json.loads((out / "classes.json").read_text()) == ["cats", "dogs"]
    assert main(["data", "verify", str(out)]) == 0
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=True)


def test_packing_mixes_the_classes_unless_told_otherwise_and_repeats_itself(pictures: Path, tmp_path: Path) -> None:
    def members(name: str, *options: str) -> list[str]:
        assert main(["data", "pack", str(pictures), "--out", str(tmp_path / name), *options]) == 0
        data = Shards([packing.pattern(tmp_path / name)], [packing.pattern(tmp_path / name)], batch_size=12)
        data.setup()
        return [label for batch in data.val_dataloader() for label in batch["label"].tolist()]

    assert members("sorted", "--keep-order") == [0] * 7 + [1] * 5
    assert members("mixed") != [0] * 7 + [1] * 5
    members("again")
    members("other", "--seed", "1")
    contents = {name: (tmp_path / name / "SHA256SUMS").read_text() for name in ("mixed", "again", "other")}
    assert contents["mixed"] == contents["again"] != contents["other"]


def test_files_of_one_name_form_one_sample(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for name, content in (("b.txt", "two"), ("b.json", "{}"), ("deep/a.txt", "one"), ("deep/a.json", "[]")):
        (folder / name).write_text(content)
    assert main(["data", "pack", str(folder), "--out", str(tmp_path / "out")]) == 0
    data = Shards([str(tmp_path / "out" / "00000.tar")], fields={"text": "txt", "about": "json"}, batch_size=2)
    data.setup()
    assert sorted(chain.from_iterable(batch["text"] for batch in data.train_dataloader())) == ["one", "two"]


def test_verify_names_what_is_missing_and_what_is_damaged_down_to_the_sample(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    main(["data", "pack", str(pictures), "--out", str(out), "--shard-size", "5K"])
    start = json.loads((out / "00001.tar.index.json").read_text())["starts"][1]
    damage(str(out / "00001.tar"), start + 600)
    (out / "00000.tar").unlink()
    capsys.readouterr()
    assert main(["data", "verify", str(out)]) == 1
    printed = capsys.readouterr().out
    assert f"{out}/00000.tar: missing or unreadable" in printed
    assert f"00001.tar: its sha256 is not the one that was written; 1 of 3 samples are damaged: 1 (byte {start})" in (
        printed
    )
    assert "files are as they were written" in printed


def test_a_folder_that_fails_to_be_packed_leaves_nothing_behind(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.mkdir()

    def fails(*arguments: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(packing, "_write_index", fails)
    assert main(["data", "pack", str(pictures), "--out", str(target / "packed")]) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "{}"], "data pack needs a folder to write; name it with --out DIR"),
        (["pack", "{}", "--out", "{}"], r"exists already; name a new folder with --out"),
        (["pack", "{}/none", "--out", "{}/out"], "none is not a folder"),
        (["pack", "{}", "--out", "{}/out", "--shard-size", "12X"], "--shard-size 12X is not a size from 1K up"),
        (["pack", "{}", "--out", "{}/out", "--seed", "-1"], "--seed -1 is negative"),
        (["verify", "{}"], r"SHA256SUMS cannot be read .*only folders that `data pack` wrote"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    pictures: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["data", *(argument.replace("{}", str(pictures)) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    with pytest.raises(UserError, match=message):
        raise UserError(error)
    assert error.count("\n") == 1


def test_folders_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no file to pack"):
        sources(tmp_path / "empty")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "README").write_text("x")
    with pytest.raises(UserError, match="README has no ending that could say what it holds"):
        sources(tmp_path / "files")
    (tmp_path / "images" / "cat").mkdir(parents=True)
    for name in ("a.jpg", "a.png"):
        (tmp_path / "images" / "cat" / name).write_bytes(b"")
    with pytest.raises(UserError, match="2 images are named cat/a up to the first dot"):
        sources(tmp_path / "images")


def test_a_list_of_sums_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  ../secret\n")
    assert main(["data", "verify", str(tmp_path)]) == 2


def test_sizes_have_units() -> None:
    assert [parse_size(text) for text in ("2048", "1K", "3MB", "2GiB")] == [2048, 1024, 3 * 2**20, 2 * 2**30]
    with pytest.raises(UserError, match="write for instance 64M"):
        parse_size("1023")
