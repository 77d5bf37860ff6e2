"""R's lazy-load databases: every packing, and what is said when a package is missing or damaged."""

import bz2
import gzip
import lzma
import struct
import zlib
from pathlib import Path

import pytest

from lightspan.core.errors import UserError
from lightspan.datamodules.r_data import LIBRARIES, find_package, read_r_data, unpack

XDR = b"X\n" + struct.pack(">iii", 3, 0x40300, 0x30500) + struct.pack(">i5s", 5, b"UTF-8")
LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 6}]


def text(word: str) -> bytes:
    mark = 0x40009 if word.isascii() else 0x8009
    return struct.pack(">ii", mark, len(word.encode())) + word.encode()


def texts(words: list[str]) -> bytes:
    return struct.pack(">ii", 16, len(words)) + b"".join(map(text, words))


def whole(*numbers: int) -> bytes:
    return struct.pack(f">ii{len(numbers)}i", 13, len(numbers), *numbers)


def named_list(items: dict[str, bytes]) -> bytes:
    names = struct.pack(">ii", 0x402, 1) + text("names") + texts(list(items)) + struct.pack(">i", 254)
    return struct.pack(">ii", 0x213, len(items)) + b"".join(items.values()) + names


def packed(data: bytes, how: str) -> bytes:
    size = struct.pack(">I", len(data))
    return {
        "zlib": size + zlib.compress(data),
        "bzip2": size + b"2" + bz2.compress(data),
        "lzma": size + b"Z" + lzma.compress(data, lzma.FORMAT_RAW, filters=LZMA),
        "nothing": size + b"0" + data,
    }[how]


def make_package(library: Path, package: str, sets: dict[str, bytes]) -> Path:
    """Writes an R package's data as R does, each set packed in another way."""
    folder = library / package / "data"
    folder.mkdir(parents=True)
    places, content = {}, b""
    for i, (name, data) in enumerate(sets.items()):
        piece = packed(XDR + data, ("zlib", "bzip2", "lzma", "nothing")[i % 4])
        places[name] = whole(len(content), len(piece))
        content += piece
    (folder / "Rdata.rdb").write_bytes(content)
    (folder / "Rdata.rdx").write_bytes(gzip.compress(XDR + named_list({"variables": named_list(places)})))
    return folder


@pytest.mark.parametrize("how", ["zlib", "bzip2", "lzma", "nothing"])
def test_every_packing_is_undone(how: str) -> None:
    data = bytes(range(256)) * 40
    assert unpack(packed(data, how)) == data
    with pytest.raises((ValueError, EOFError, zlib.error, lzma.LZMAError)):
        unpack(packed(data, how)[:-20])


def test_named_sets_come_in_the_order_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("rdata")
    words = {name: [name, "", "naïve …"] for name in ("a", "b", "c", "d")}
    make_package(tmp_path, "novels", {name: texts(lines) for name, lines in words.items()})
    assert read_r_data("novels", ("d", "b", "a", "c"), str(tmp_path)) == [words[name] for name in "dbac"]


def test_a_missing_package_is_named_with_both_ways_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"apt-get install r-cran-modeldata.*dpkg -x .*data\.init_args\.library="):
        find_package("modeldata", str(tmp_path))
    with pytest.raises(UserError, match=f"the R package nosuchthing is not in {LIBRARIES[0]}"):
        find_package("nosuchthing", None)


@pytest.mark.parametrize("damage", ["cut", "index", "name"])
def test_damage_is_one_readable_line(tmp_path: Path, damage: str) -> None:
    pytest.importorskip("rdata")
    folder = make_package(tmp_path, "novels", {"a": texts(["x"] * 100)})
    if damage == "cut":
        (folder / "Rdata.rdb").write_bytes((folder / "Rdata.rdb").read_bytes()[:30])
    elif damage == "index":
        (folder / "Rdata.rdx").write_bytes(b"\x1f\x8b nonsense")
    with pytest.raises(UserError, match=r"novels.*does not contain .* reinstall r-cran-novels"):
        read_r_data("novels", ("b" if damage == "name" else "a",), str(tmp_path))
