"""What stands where a file is expected: a pipe, a device, a folder, a circle of links, nothing, or ten terabytes of it.

Every reader says so in one ValueError, and neither waits nor fills the memory.
"""

import io
import lzma
import os
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from lightspan.adapters.peft import StoredChange
from lightspan.adapters.state import load_adapter
from lightspan.backbones.language import stored_encoder
from lightspan.backbones.tokenizers import stored_tokenizer
from lightspan.backbones.weights import with_weights
from lightspan.core.errors import UserError
from lightspan.core.files.arrays import mapped_array, read_array, read_arrays
from lightspan.core.files.foreign import (
    BYTES,
    CHARACTERS,
    NUMBERS,
    PIXELS,
    SECONDS,
    VOCABULARY_BYTES,
    TooMuchError,
    bounded_time,
    content_of,
    settings_object,
    unpacked,
    whole_text,
)
from lightspan.core.files.tensors import shards_of, stored_tensors
from lightspan.datamodules.audio import sound
from lightspan.datamodules.image.packed import Decoder
from lightspan.datamodules.image.sets.small import read_idx
from lightspan.datamodules.image_text.stamps import thumbnail
from lightspan.datamodules.multispectral.tiffs import read_tiff
from lightspan.datamodules.r_data import read_r_data
from lightspan.datamodules.sequence.own import OwnSequences
from lightspan.datamodules.shards.index import scan
from lightspan.datamodules.shards.shelves import FolderShelf
from lightspan.datamodules.shards.verify import listed
from lightspan.datamodules.table.columns import read_columns
from lightspan.datamodules.text.documents import Skipped, find_documents
from lightspan.datamodules.text.json_lines import json_lines
from lightspan.datamodules.text.spelling import WordList
from lightspan.datamodules.text.windows import ByteText
from lightspan.datamodules.video.reader import index_of
from lightspan.evaluation.features.encoded import FeatureFile
from lightspan.evaluation.features.label_distances import LabelDistances
from lightspan.evaluation.label_spaces.wordnet import read_nouns
from lightspan.merging.weights import open_weights
from lightspan.optim.subspace_file import apply_subspace
from lightspan.training.checkpoints.io import outline, read_checkpoint

HANGS_S = 120
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    # By what they read: the name that the file has in its folder, and the reader of that file.
    "bytes": ("a.bin", content_of),
    "text": ("a.txt", whole_text),
    "settings": ("a.json", settings_object),
    "picture": ("a.png", Decoder(8, "crop", 255)),
    "stamp": ("a.png", thumbnail),
    "recording": ("a.wav", sound.read),
    "video": ("a.mp4", index_of),
    "header of a recording": ("a.wav", sound.header),
    "scene": ("a.tif", partial(read_tiff, bands=None)),
    "array": ("a.npy", read_array),
    "arrays": ("a.npz", read_arrays),
    "array on disk": ("a.npy", mapped_array),
    "table": ("a.csv", read_columns),
    "idx": ("a.gz", read_idx),
    "words": ("a.txt", lambda path: WordList(str(path), stored_tokenizer).setup()),
    "text in windows": ("a.txt", lambda path: ByteText([str(path)]).setup()),
    "documents": ("a.txt", lambda path: _documents(path)),
    "JSON Lines": ("a.jsonl", lambda path: json_lines(str(path), "data.init_args.path", "text", "text")),
    "sequences": ("a.npz", lambda path: OwnSequences(str(path)).setup()),
    "shard": ("a.tar", lambda path: _scanned(path)),
    "sums": ("SHA256SUMS", lambda path: listed(FolderShelf(path.parent))),
    "R data": ("R/data/Rdata.rdx", lambda path: read_r_data("R", ("x",), str(path.parents[2]))),
    "WordNet": ("data.noun", lambda path: read_nouns(str(path.parent))),
    "tensors": ("a.safetensors", stored_tensors),
    "index": ("model.safetensors.index.json", lambda path: shards_of(path.parent) or _nothing()),
    "weights": ("a.safetensors", open_weights),
    "weights of a part": ("a.safetensors", lambda path: with_weights(nn.Linear(1, 1), str(path))),
    "network": ("config.json", lambda path: stored_encoder(str(path.parent))),
    "tokenizer": ("tokenizer.json", lambda path: stored_tokenizer(str(path.parent))),
    "template": ("chat_template.jinja", lambda path: stored_tokenizer(str(path.parent))),
    "PEFT": ("adapter_config.json", lambda path: StoredChange(path.parent)),
    "adapter": ("a.safetensors", lambda path: load_adapter(nn.Linear(1, 1), path)),
    "subspace": ("a.safetensors", lambda path: apply_subspace(path, nn.Linear(1, 1))),
    "features": ("a.safetensors", lambda path: FeatureFile(str(path)).load(None)),  # type: ignore[arg-type]
    "distances": ("a.safetensors", lambda path: LabelDistances(str(path)).load(None)),  # type: ignore[arg-type]
    "checkpoint": ("a.ckpt", read_checkpoint),
    "outline of a checkpoint": ("a.ckpt", outline),
}


def _nothing() -> None:
    raise ValueError("there is no index")


def _scanned(path: Path) -> None:
    if damage := scan(path, str(path), 2**20)[1]:
        raise ValueError(damage)


def _documents(path: Path) -> list[bytes]:
    return [document.content for document in find_documents([str(path)], (".txt",), Skipped()) if document.content]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def circle(path: Path) -> None:
    path.symlink_to(path)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        try:
            file.truncate(10**13)
        except OSError:
            pytest.skip("this file system has no sparse files of ten terabytes")


HOSTILE: tuple[Callable[[Path], None], ...] = (pipe, device, Path.mkdir, circle, Path.touch, sparse, lambda path: None)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """A reader that waits fails its test instead of keeping it for ever."""

    def fail(*_: object) -> None:
        pytest.fail(f"still reading after {HANGS_S} s")  # which no reader takes for damage: it is no Exception

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(HANGS_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_what_is_no_file_of_its_kind(reader: str, tmp_path: Path) -> None:
    needed = {"recording": "soundfile", "scene": "tifffile", "R data": "rdata", "video": "av"}
    if (module := needed.get(reader.split()[-1])) is not None:
        pytest.importorskip(module)
    name, read = READERS[reader]
    for number, make in enumerate(HOSTILE):
        path = tmp_path / str(number) / name
        path.parent.mkdir(parents=True)
        (path.parent / "index.noun").write_text("")
        make(path)
        if reader in ("bytes", "text", "documents") and make is Path.touch:
            assert not read(path)  # nothing is a text too
            continue
        with pytest.raises(ValueError, match=r"\S") as refused:
            read(path)
        assert len(str(refused.value)) < 1_500


def test_limits_are_raised_in_the_environment_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    monkeypatch.setenv(BYTES.setting, "4")
    with pytest.raises(ValueError, match=r"it has 5 bytes, and the limit is 4; .* LIGHTSPAN_MAX_BYTES"):
        content_of(tmp_path / "a")
    monkeypatch.setenv(BYTES.setting, "5")
    assert content_of(tmp_path / "a") == b"12345"
    for wrong in ("five", "-1", "1e9", "9" * 30):
        monkeypatch.setenv(BYTES.setting, wrong)
        with pytest.raises(UserError, match="LIGHTSPAN_MAX_BYTES"):
            content_of(tmp_path / "a")


def test_limits_leave_room_for_what_people_train_on() -> None:
    assert PIXELS.default >= 8_000 * 8_000
    assert NUMBERS.default >= 3_600 * 48_000  # an hour of sound
    assert BYTES.default >= 2**32
    assert CHARACTERS.default >= 2**24  # five Bibles
    assert VOCABULARY_BYTES.default >= 2**26  # twice the largest that are published


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a program of a file")
def test_a_limit_of_time_inside_another_leaves_that_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS.setting, "1")
    with pytest.raises(TooMuchError, match=SECONDS.setting), bounded_time():  # noqa: PT012
        with bounded_time():
            pass
        while True:
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a program of a file")
def test_a_program_that_stays_inside_one_operation_of_c_ends_with_its_process() -> None:
    equal = "[x] * 10**8 == [y] * 10**8"  # 10^15 letters are compared, and no signal is looked at meanwhile
    code = "from lightspan.core.files.foreign import bounded_program\n"
    code += f"x, y = ''.join(['a'] * 10**7), ''.join(['a'] * 10**7)\nwith bounded_program():\n    {equal}\n"
    limited = os.environ | {SECONDS.setting: "1"}
    ended = subprocess.run([sys.executable, "-c", code], env=limited, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGVTALRM
    assert "line 4" in ended.stderr


def test_what_unpacks_to_more_than_the_limit_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = zlib.compress(bytes(10**6))
    assert unpacked(bomb) == bytes(10**6)
    monkeypatch.setenv(BYTES.setting, "999999")
    with pytest.raises(ValueError, match="unpacks to more than 999,999 bytes"):
        unpacked(bomb)
    with pytest.raises(ValueError, match="cut short"):
        unpacked(zlib.compress(b"short")[:-1])


def test_an_array_is_as_large_as_it_says_before_it_gets_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**27,)})
    with pytest.raises(ValueError, match="cut short: 134,217,728 numbers"):
        read_array(header.getvalue())
    for text in (
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        b"{" * 9_000,
        b"[" * 200,
        b"__import__('os')",
    ):
        with pytest.raises(ValueError, match=r"no \.npy file"):
            read_array(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\n")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(10**6))
    monkeypatch.setenv(BYTES.setting, "999999")
    with pytest.raises(ValueError, match="1,000,000 bytes"):
        read_arrays(tmp_path / "a.npz")


def test_a_scene_and_a_recording_are_measured_before_they_get_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile, soundfile = pytest.importorskip("tifffile"), pytest.importorskip("soundfile")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 40, 40), np.uint8), compression="zlib", photometric="minisblack")
    soundfile.write(tmp_path / "a.flac", np.zeros((4_000, 2)), 8_000)
    monkeypatch.setenv(NUMBERS.setting, "4799")
    with pytest.raises(ValueError, match="it has 4,800 numbers"):
        read_tiff(tmp_path / "a.tif", 3)
    with pytest.raises(ValueError, match="it has 8,000 numbers"):
        sound.read(tmp_path / "a.flac")
    assert len(sound.read(tmp_path / "a.flac", 100, 2_000)[0]) == 2_000


def test_a_part_of_a_scene_unpacks_to_no_more_than_the_scene(tmp_path: Path) -> None:
    tifffile, path = pytest.importorskip("tifffile"), tmp_path / "a.tif"
    tifffile.imwrite(path, np.ones((8, 8), np.uint8), compression="zlib")
    assert read_tiff(path, 1).tolist() == np.ones((1, 8, 8)).tolist()
    with tifffile.TiffFile(path) as file:
        tags = file.pages[0].tags
        places = [tags[name].valueoffset for name in ("StripOffsets", "StripByteCounts", "Compression")]

    def scene(compression: int, part: bytes) -> bytes:
        content = bytearray(path.read_bytes())
        for place, size, value in zip(places, (4, 4, 2), (len(content), len(part), compression), strict=True):
            content[place : place + size] = value.to_bytes(size, "little")
        return bytes(content + part)

    deflate, packbits, zstd = 8, 32773, 50000
    for compression, bomb in ((deflate, zlib.compress(bytes(2**28))), (packbits, b"\x81\x00" * 2**17)):
        with pytest.raises(ValueError, match="unpacks to more than"):
            read_tiff(scene(compression, bomb), 1)
    for compression, bomb in ((deflate, zlib.compress(bytes(2**23))), (34925, lzma.compress(bytes(2**23)))):
        assert len(bomb) < 2**14  # several such parts are unpacked at once
        with pytest.raises(ValueError, match="unpacks to more than"):
            read_tiff(scene(compression, bomb), 1)
    rows = bytes([2, 7, 7, 7, 128, 252, 9]) * 8  # three bytes as they are, nothing, and one five times
    assert read_tiff(scene(packbits, rows + b"\x80" * 2**17), 1).tolist() == [[[7] * 3 + [9] * 5] * 8]
    with pytest.raises(ValueError, match=r"damaged TIFF|requires"):
        read_tiff(scene(zstd, b"none"), 1)


def test_a_scene_is_what_is_in_its_own_file(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "other.tif", np.full((8, 8), 2, np.uint8))
    os.mkfifo(tmp_path / "pipe")
    plane = "<TiffData IFD='0' FirstZ='{}' PlaneCount='1'><UUID FileName='{}'>{}</UUID></TiffData>"
    (tmp_path / "inside").mkdir()
    for other in ("../other.tif", str(tmp_path / "other.tif"), "../pipe"):
        pixels = "<Pixels DimensionOrder='XYZCT' SizeC='1' SizeT='1' SizeX='8' SizeY='8' SizeZ='2' Type='uint8'>"
        planes = plane.format(0, "a.tif", "a") + plane.format(1, other, "b")
        text = f"<OME xmlns='http://x/OME' UUID='a'><Image>{pixels}{planes}</Pixels></Image></OME>"
        path = tmp_path / "inside" / "a.tif"
        tifffile.imwrite(path, np.ones((8, 8), np.uint8), description=f"<?xml version='1.0'?>{text}", metadata=None)
        assert read_tiff(path, None).tolist() == np.ones((1, 8, 8)).tolist()
