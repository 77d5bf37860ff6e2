"""`lightspan data`: what is packed comes back, whole or not at all, and damage is found down to the sample."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from itertools import chain
from pathlib import Path

import pytest
from PIL import Image
from shard_files import damage

from lightspan.cli.commands.data import parse_size
from lightspan.cli.main import main
from lightspan.core.errors import UserError
from lightspan.datamodules.shards import pack as packing
from lightspan.datamodules.shards.pack_sources import sources
from lightspan.datamodules.shards.stream import Shards


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


def read(folder: Path, count: int = 12) -> list[tuple[int, int, int]]:
    """(red, green, label) of each sample that training sees in one epoch, sorted."""
    data = Shards([packing.pattern(folder)], batch_size=count, mean=(0, 0, 0), std=(1, 1, 1))
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
    assert "1 hidden files and folders are left out" in printed
    assert f"12 samples of 2 classes (cats, dogs) in {len(shards)} shards" in printed
    assert (
        "next: data.class_path=lightspan.datamodules.shards.stream.Shards "
        f"'data.init_args.shards=[{out}/{{00000..{shards[-1][:5]}}}.tar]' "
        "'data.init_args.fields={image: png, label: cls}' data.init_args.batch_size=12 data.init_args.image_size=4\n"
    ) in printed
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
    assert f"{out}/00000.tar cannot be read (No such file or directory)" in printed
    assert f"00001.tar: its sha256 is not the recorded one; 1 of 3 samples are damaged: 1 (byte {start})" in (printed)
    assert "files are unchanged" in printed


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
        (["pack", "{}", "--out", "{}"], r"already exists; name a new folder with --out"),
        (["pack", "{}/none", "--out", "{}/out"], "none is not a folder"),
        (["pack", "{}", "--out", "{}/out", "--shard-size", "12X"], "--shard-size 12X is not a size from 1K up"),
        (["pack", "{}", "--out", "{}/out", "--seed", "-1"], "--seed -1 is negative"),
        (["pack", "{}", "--out", "/proc/lightspan"], "cannot make the folder /proc/lightspan: No such file.*--out"),
        (["index", "{}"], "contains no .tar file"),
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
    with pytest.raises(UserError, match="empty contains no file to pack"):
        sources(tmp_path / "empty")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "README").write_text("x")
    with pytest.raises(UserError, match="README has no ending that could say what it contains"):
        sources(tmp_path / "files")
    (tmp_path / "images" / "cat").mkdir(parents=True)
    for name in ("a.jpg", "a.png"):
        (tmp_path / "images" / "cat" / name).write_bytes(b"")
    with pytest.raises(UserError, match="2 files are named cat/a, with dots as _"):
        sources(tmp_path / "images")
    (tmp_path / "twice").mkdir()
    for name in ("a.txt", "a.TXT"):
        (tmp_path / "twice" / name).touch()
    with pytest.raises(UserError, match=r"a\.txt and another file would both be the member a\.txt"):
        sources(tmp_path / "twice")


# What a folder holds


def test_names_that_readers_would_pass_over_are_refused(pictures: Path) -> None:
    (pictures / "cats").rename(pictures / "__background__")
    for as_files in (False, True):
        with pytest.raises(UserError, match=r"pictures/__background__: names like __THIS__ .* rename it"):
            sources(pictures, as_files)


@pytest.mark.parametrize("name", ["cats/Thumbs.db", "cats/x.gif", "README.md", "flat.png"])
def test_one_stray_file_does_not_cost_the_labels_in_silence(pictures: Path, name: str) -> None:
    shutil.copy(pictures / "cats" / "0.png", pictures / name)
    with pytest.raises(UserError, match=rf"pictures/{name} is not an image .* in a class folder, .*--files"):
        sources(pictures)
    if name != "README.md":
        files = sources(pictures, as_files=True)
        assert (len(files.samples), files.classes) == (13, [])
        assert "samples have no label" in files.remarks[1]


@pytest.mark.parametrize("of", ["folder", "file", "pipe"])
def test_nothing_that_leads_elsewhere_is_followed(pictures: Path, tmp_path: Path, of: str) -> None:
    (tmp_path / "private").mkdir()
    place = pictures / "cats" / "more" / "x.png" if of != "folder" else pictures / "private"
    if of == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(tmp_path / "private" if of == "folder" else pictures / "cats" / "0.png")
    with pytest.raises(UserError, match=rf"{place} is (a link|not a regular file)"):
        sources(pictures)


def test_a_flat_folder_of_images_has_no_labels_and_says_so(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "pack", str(pictures / "dogs" / "more"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "samples have no label: no folder contains images or recordings of one class" in printed
    assert "'data.init_args.fields={image: png}'" in printed
    data = Shards([packing.pattern(tmp_path / "out")], fields={"image": "png"}, batch_size=2)
    data.setup()
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 4, 4)


def test_a_picture_and_its_mask_are_one_sample_with_a_field_for_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        Image.new("RGB", (4, 4)).save(tmp_path / "in" / f"{number}.png")
        Image.new("L", (4, 4), number).save(tmp_path / "in" / f"{number}.mask.png")
    assert main(["data", "pack", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert "'data.init_args.fields={image: png, semantic: mask.png}'" in capsys.readouterr().out
    Image.new("RGB", (4, 4)).save(tmp_path / "in" / "1.mask.png")
    with pytest.raises(UserError, match=r"1\.mask\.png: it has 3 channels \(RGB\), and a mask has one"):
        list(packing.pack(sources(tmp_path / "in").samples, [], tmp_path / "again", 2**20))


def test_names_with_dots_keep_their_ending(pictures: Path) -> None:
    (pictures / "dogs" / "0.png").rename(pictures / "dogs" / "at 12.30.15.PNG")
    samples = sources(pictures).samples
    assert {"dogs/at 12_30_15.png": pictures / "dogs" / "at 12.30.15.PNG", "dogs/at 12_30_15.cls": b"1"} in samples


def test_a_class_without_images_keeps_its_number_and_is_named(pictures: Path) -> None:
    (pictures / "bees").mkdir()
    found = sources(pictures)
    assert found.classes == ["bees", "cats", "dogs"]
    assert {sample[name] for sample in found.samples for name in sample if name.endswith(".cls")} == {b"1", b"2"}
    assert "1 of 3 classes have no sample: bees" in found.remarks


def test_samples_that_lack_a_member_are_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "a.json", "b.txt", "c.txt", "c.cls"):
        (tmp_path / name).touch()
    assert sources(tmp_path).remarks == ["2 of 3 samples have no .cls", "2 of 3 samples have no .json"]


def test_endings_that_nothing_decodes_are_refused_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a.bmp").write_bytes(b"BM")
    with pytest.raises(
        UserError, match=r"no file with an ending that can be decoded .*, but bmp, as an ending begins at the first dot"
    ):
        sources(tmp_path)
    assert len(sources(tmp_path, as_files=True).samples) == 1


def test_pairs_are_packed_for_the_data_that_read_pairs(tmp_path: Path, capsys) -> None:
    folder, out = tmp_path / "pairs", tmp_path / "packed"
    folder.mkdir()
    for name in ("a.1.png", "a.2.png", "b.1.png", "b.2.png"):
        Image.new("RGB", (8, 6)).save(folder / name)
    assert main(["data", "pack", str(folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(
        "next: data.class_path=lightspan.datamodules.shards.paired.PairedShards "
        f"'data.init_args.shards=[{out}/00000.tar]' data.init_args.batch_size=2 data.init_args.image_size=6\n"
    )
    (folder / "b.2.png").write_bytes(b"no image")
    assert main(["data", "pack", str(folder), "--out", str(tmp_path / "again")]) == 2
    assert "b.2.png: it is not a JPEG, PNG, WebP, BMP, GIF or TIFF image" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="names of other systems are text")
def test_names_that_are_not_utf8_are_refused(pictures: Path) -> None:
    os.rename(os.fsencode(pictures / "cats"), os.fsencode(pictures) + b"/c\xe4ts")
    with pytest.raises(UserError, match=r"the name '.*pictures/c\\udce4ts/.*png' is not UTF-8"):
        sources(pictures)


# Damage


def spoil(folder: Path) -> dict[str, str]:
    """Makes three files of `pictures` unreadable; returns {name: what is wrong}."""
    cats = folder / "cats"
    whole = (cats / "0.png").read_bytes()
    (cats / "0.png").write_bytes(b"")
    (cats / "2.png").write_bytes(b"no image")
    header = b"IHDR" + (2**15).to_bytes(4, "big") * 2 + whole[24:29]  # says that it is 32,768 pixels wide and high
    (cats / "4.png").write_bytes(whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:])
    return {"0.png": "it is empty", "2.png": "not a JPEG, PNG, WebP", "4.png": "its pixels exceed the limit"}


def test_images_that_could_not_be_read_are_not_packed(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = spoil(pictures)
    command = ["data", "pack", str(pictures), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "3 of 12 samples cannot be decoded" in error
    assert "Only the headers of images and sound were read; --decode also finds those that are cut short" in error
    for name, what in wrong.items():
        assert re.search(rf"cats/{name}: [^;]*({what})", error)
    assert not (tmp_path / "out").exists()
    assert main([*command, "--skip-damaged"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("left out: ") == 3
    assert "9 samples of 2 classes" in printed
    assert len(read(tmp_path / "out", 9)) == 9


def test_images_are_decoded_to_the_end_where_that_is_asked_for(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pictures / "dogs" / "2.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert main(["data", "pack", str(pictures), "--out", str(tmp_path / "headers")]) == 0
    assert main(["data", "pack", str(pictures), "--out", str(tmp_path / "out"), "--decode"]) == 2
    assert "dogs/2.png: " in capsys.readouterr().err


def test_a_file_that_shrinks_or_goes_while_others_are_packed_is_named(pictures: Path, tmp_path: Path) -> None:
    samples, classes, _ = sources(pictures)
    (pictures / "cats" / "0.png").write_bytes(b"")
    (pictures / "cats" / "2.png").unlink()
    with pytest.raises(UserError, match=r"2 of 12 samples .*cats/0\.png: it is empty; .*cats/2\.png: .*No such file"):
        list(packing.pack(samples, classes, tmp_path / "out", 2**20))


def test_a_disk_that_is_full_is_told_with_the_flag_that_chose_it(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    samples, classes, _ = sources(pictures)
    with pytest.raises(UserError, match=r"the disk is full .* on another disk with --out"):
        list(packing.pack(samples, classes, tmp_path / "out", 2**20))


# Afterwards


def test_verify_finds_what_pack_did_not_write_and_does_not_wait_for_pipes(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    main(["data", "pack", str(pictures), "--out", str(out)])
    (out / "00001.tar").write_bytes(b"")
    (out / ".DS_Store").touch()
    assert main(["data", "verify", str(out)]) == 1
    assert f"{out}/00001.tar: was not written by `data pack`" in capsys.readouterr().out
    (out / "00001.tar").unlink()
    (out / "00000.tar").unlink()
    os.mkfifo(out / "00000.tar")
    assert main(["data", "verify", str(out)]) == 1
    assert "is a named pipe, not a regular file" in capsys.readouterr().out


def test_verify_survives_an_index_with_huge_numbers(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    main(["data", "pack", str(pictures), "--out", str(out)])
    index = out / "00000.tar.index.json"
    document = json.loads(index.read_text())
    document["bytes"] = document["ends"][-1] = 2**50
    index.write_text(json.dumps(document))
    damage(str(out / "00000.tar"), 100)
    assert main(["data", "verify", str(out)]) == 1
    assert "2 of 12 samples are damaged: 0 (byte 0), 11" in capsys.readouterr().out


def test_index_gives_shards_of_other_tools_an_index(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    main(["data", "pack", str(pictures), "--out", str(out), "--shard-size", "5K"])
    written = {path: path.read_text() for path in sorted(out.glob("*.json"))}
    (out / "00001.tar.index.json").unlink()
    (out / "00002.tar.index.json").unlink()
    assert main(["data", "index", str(out)]) == 0
    assert "wrote the index of 2 shards with 6 samples" in capsys.readouterr().out
    assert {path: path.read_text() for path in sorted(out.glob("*.json"))} == written
    (out / "cut.tar").write_bytes((out / "00000.tar").read_bytes()[:3000])
    assert main(["data", "index", str(out)]) == 2
    assert "cut short" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../secret", "a\0b", ""])
def test_a_list_of_sums_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    assert main(["data", "verify", str(tmp_path)]) == 2


def test_a_list_of_sums_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "SHA256SUMS")
    assert main(["data", "verify", str(tmp_path)]) == 2


def test_sizes_have_units() -> None:
    for text, size in (("2048", 2048), ("1K", 1024), ("3MB", 3 * 2**20), ("2GiB", 2 * 2**30)):
        assert parse_size(text, "--shard-size") == size
    with pytest.raises(UserError, match="write for instance 64M"):
        parse_size("1023", "--shard-size")
