"""Shards from strangers: what is read, and above all what is refused."""

import gzip
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightspan.datamodules import tars
from lightspan.datamodules.tars import (
    check_fields,
    check_shard,
    decode_fields,
    expand_braces,
    group_members,
    open_shard,
)
from lightspan.errors import UserError

MIB = 2**20


def tar_bytes(members: dict[str, bytes], mode: str = "w", **changes: object) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            for attribute, value in changes.items():
                setattr(header, attribute, value)
            archive.addfile(header, io.BytesIO(content))
    return stream.getvalue()


def read_members(shard: str, max_member_bytes: int) -> Iterator[tars.Member]:
    with open_shard(shard) as stream:
        yield from tars.read_members(stream, shard, max_member_bytes)


def read_samples(shard: str, max_member_bytes: int) -> Iterator[dict[str, object]]:
    return group_members(read_members(shard, max_member_bytes), shard)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return tmp_path / "a.tar"


# Patterns


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{008..011}.tar", ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]),
        ("{x,y}/{0..1}.tar", ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]),
    ],
)
def test_braces_are_written_out_in_order(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "count"), [("{0..999999999999999999}", "1,000,000,000,000,000,000"), ("{5..4}.tar", "0")]
)
def test_braces_that_stand_for_too_many_shards_or_none_are_refused_at_once(pattern: str, count: str) -> None:
    with pytest.raises(UserError, match=rf"stands for {count} shards, which must be 1 to 100,000"):
        expand_braces(pattern)


# Addresses


@pytest.mark.parametrize(
    "shard", ["pipe:touch /tmp/x", "http://host/a.tar", "PIPE:ls", "file:///etc/passwd", "s3://bucket/a.tar"]
)
def test_every_scheme_but_https_is_refused(shard: str) -> None:
    for use in (check_shard, open_shard):
        with pytest.raises(UserError, match=r"is neither a local path nor https \(\w+: is refused"):
            use(shard)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.tar cannot be opened: .*No such file.*data.init_args.shards"):
        open_shard(str(tmp_path / "none.tar"))


def test_shards_are_read_over_https_and_nothing_leads_out_of_it(
    https_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tar_bytes({"a.txt": b"hello", "b.txt": b"world" * 5000})
    https_server.files |= {"/a.tar": whole, "/cut.tar": whole[:9000]}
    address = https_server.address
    assert [sample["txt"] for sample in read_samples(f"{address}/a.tar", MIB)] == [b"hello", b"world" * 5000]
    with pytest.raises(UserError, match=r"cut\.tar is not a tar file, or is cut short"):
        list(read_samples(f"{address}/cut.tar", MIB))
    with pytest.raises(UserError, match=r"none\.tar cannot be opened: .*404"):
        list(read_samples(f"{address}/none.tar", MIB))
    with pytest.raises(UserError, match=r"shard http://127.0.0.1:9/a.tar is neither"):
        list(read_samples(f"{address}/downgrade.tar", MIB))
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(UserError, match=r"(?i)cannot be opened: .*certificate"):
        list(read_samples(f"{address}/a.tar", MIB))


# Archives


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2"])
def test_members_side_by_side_form_samples_in_order(shard: Path, mode: str) -> None:
    members = {f"{i:03}.{ending}": f"{i}{ending}".encode() for i in range(50) for ending in ("txt", "CLS")}
    shard.write_bytes(tar_bytes({"__meta__": b"{}", **members}, mode))
    samples = list(read_samples(str(shard), MIB))
    assert [sample["__key__"] for sample in samples] == [f"{i:03}" for i in range(50)]
    assert samples[7] == {"__key__": "007", "__url__": str(shard), "txt": b"7txt", "cls": b"7CLS"}


@pytest.mark.parametrize("content", [b"", b"not a tar" * 500, b"\x80\x04pickle"])
def test_what_is_no_tar_is_named(shard: Path, content: bytes) -> None:
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar is not a tar file, or is cut short"):
        list(read_members(str(shard), MIB))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_shard_cut_short_anywhere_is_named(shard: Path, compressed: bool) -> None:
    whole = tar_bytes({f"{i}.npy": np.random.default_rng(i).bytes(1500) for i in range(3)})
    end = len(whole.rstrip(b"\0"))
    for length in range(1, end, 256):  # also on the border between two members, where tarfile sees nothing wrong
        content = whole[:length]
        shard.write_bytes(gzip.compress(whole)[: length // 4] if compressed else content)
        with pytest.raises(UserError, match=r"a\.tar is (not a tar file, or is )?cut short"):
            list(read_members(str(shard), MIB))


def test_garbage_between_members_is_named(shard: Path) -> None:
    whole = bytearray(tar_bytes({"a.txt": b"x", "b.txt": b"y"}))
    whole[1024:1536] = b"\xff" * 512  # the second header
    shard.write_bytes(bytes(whole))
    with pytest.raises(UserError, match=r"a\.tar is (not a tar file, or is )?cut short"):
        list(read_members(str(shard), MIB))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("../a.txt", {}, r"member \.\./a\.txt leaves its folder"),
        ("/etc/a.txt", {}, r"member /etc/a\.txt leaves its folder"),
        ("a.txt", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "member a.txt is a link, a device or sparse"),
        ("a.txt", {"type": tarfile.LNKTYPE, "linkname": "b.txt"}, "member a.txt is a link"),
        ("a.txt", {"type": tarfile.FIFOTYPE}, "member a.txt is a link, a device"),
    ],
)
def test_unsafe_members_are_refused(shard: Path, name: str, changes: dict[str, object], message: str) -> None:
    shard.write_bytes(tar_bytes({name: b""}, **changes))
    with pytest.raises(UserError, match=message):
        list(read_members(str(shard), MIB))


@pytest.mark.parametrize(
    ("kind", "style"),
    [
        (tarfile.REGTYPE, tarfile.GNU_FORMAT),
        (tarfile.REGTYPE, tarfile.PAX_FORMAT),  # the size stands in an extended header of its own
        (tarfile.XHDTYPE, tarfile.GNU_FORMAT),
        (tarfile.GNUTYPE_LONGNAME, tarfile.GNU_FORMAT),
    ],
)
def test_a_member_above_the_limit_is_refused_before_it_is_read(shard: Path, kind: bytes, style: int) -> None:
    header = tarfile.TarInfo("big.txt")
    header.type, header.size = kind, 2**40
    shard.write_bytes(header.tobuf(style))  # no content: reading it would fail in another way
    with pytest.raises(UserError, match=r"has 1,099,511,627,776 bytes, above the limit of 1,048,576; .*max_member_mib"):
        list(read_members(str(shard), MIB))


def test_two_members_of_one_name_are_refused(shard: Path) -> None:
    shard.write_bytes(tar_bytes({"a.txt": b"1", "a.TXT": b"2"}))
    with pytest.raises(UserError, match=r"a\.tar: a\.TXT: duplicate file name .*its own ending"):
        list(read_samples(str(shard), MIB))


# Values


def encoded(value: object) -> bytes:
    stream = io.BytesIO()
    if isinstance(value, Image.Image):
        value.save(stream, "PNG")
    else:
        np.save(stream, value, allow_pickle=True)  # type: ignore[arg-type]
    return stream.getvalue()


def sample(**members: bytes) -> dict[str, object]:
    return {"__key__": "k7", "__url__": "a.tar", **members}


def test_members_are_decoded_by_their_ending() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    members = sample(
        png=encoded(Image.fromarray(pixels)),
        cls=b"12\n",
        txt="żółw".encode(),
        json=json.dumps({"a": 1}).encode(),
        npy=encoded(np.arange(3)),
    )
    fields = {"image": "jpg|png", "label": "cls", "caption": "txt", "about": "json", "vector": "npy"}
    values = decode_fields(members, fields)
    assert torch.equal(values["image"], torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(values["vector"], torch.arange(3))
    assert (values["label"], values["caption"], values["about"]) == (12, "żółw", {"a": 1})


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        ("png", b"no image"),
        ("png", encoded(Image.new("RGB", (64, 64)))[:60]),
        ("png", b"%!PS-Adobe-3.0 EPSF-3.0\n"),
        ("cls", b"seven"),
        ("txt", b"\xff\xfe\xff"),
        ("json", b"{"),
        ("json", b"[" * 100_000),
        ("npy", b"\x93NUMPY"),
        ("npy", encoded(np.array([{"an": "object"}], dtype=object))),
        ("npy", encoded(np.zeros(3)).replace(b"(3,)", b"(9999999999999,)")),
    ],
)
def test_bytes_that_are_not_what_their_ending_says_are_named(ending: str, content: bytes) -> None:
    with pytest.raises(UserError, match=rf"shard a\.tar: sample k7: its \.{ending} member cannot be decoded"):
        decode_fields(sample(**{ending: content}), {"field": ending})


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MAX_PIXELS", 99)
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(UserError, match="10 x 10 pixels are above the limit of 99"):
        decode_fields(sample(png=encoded(Image.new("L", (10, 10)))), {"image": "png"})


def test_a_sample_without_the_member_is_named() -> None:
    with pytest.raises(UserError, match=r"sample k7 has no \.jpg or \.png member for image; it has txt"):
        decode_fields(sample(txt=b""), {"image": "jpg|png"})


@pytest.mark.parametrize("ending", ["pkl", "pickle", "pyd", "pth"])
def test_pickled_members_have_no_decoder(ending: str) -> None:
    with pytest.raises(
        UserError, match=rf"x asks for \.{ending} members, .* never read; decoders exist for jpg, .*npy"
    ):
        check_fields({"x": ending})


def test_unknown_endings_and_no_fields_are_refused() -> None:
    with pytest.raises(UserError, match=r"image asks for \.tif members, which have no decoder; decoders"):
        check_fields({"image": "png|tif"})
    with pytest.raises(UserError, match="fields is empty"):
        check_fields({})
