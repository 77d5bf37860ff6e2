"""Shards from strangers: what is read, and above all what is refused."""

import io
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys

from lightspan.core.errors import UserError
from lightspan.datamodules.shards import tars
from lightspan.datamodules.shards.fetch import open_shard
from lightspan.datamodules.shards.tars import META, group_members

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


def read_members(shard: str, max_member_bytes: int) -> Iterator[tars.TarMember]:
    with open_shard(shard) as stream:
        yield from tars.read_members(stream, shard, max_member_bytes)


def read_samples(shard: str, max_member_bytes: int) -> Iterator[dict[str, object]]:
    return group_members(read_members(shard, max_member_bytes), shard)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return tmp_path / "a.tar"


# Archives


def test_members_side_by_side_form_samples_in_order(shard: Path) -> None:
    members = {f"{i:03}.{ending}": f"{i}{ending}".encode() for i in range(50) for ending in ("txt", "CLS")}
    shard.write_bytes(tar_bytes({"__meta__": b"{}", **members}))
    samples = list(read_samples(str(shard), MIB))
    assert [sample["__key__"] for sample in samples] == [f"{i:03}" for i in range(50)]
    assert samples[7] == {"__key__": "007", "__url__": str(shard), "txt": b"7txt", "cls": b"7CLS"}


@pytest.mark.parametrize("content", [b"", b"not a tar" * 500, b"\x80\x04pickle"])
def test_what_is_no_tar_is_named(shard: Path, content: bytes) -> None:
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar is not a tar file, or is cut short"):
        list(read_members(str(shard), MIB))


def test_a_shard_cut_short_anywhere_is_named(shard: Path) -> None:
    whole = tar_bytes({f"{i}.npy": np.random.default_rng(i).bytes(1500) for i in range(3)})
    for length in range(1, len(whole.rstrip(b"\0")), 256):  # also between members, where tarfile sees nothing wrong
        shard.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.tar is (not a tar file, or is )?cut short"):
            list(read_members(str(shard), MIB))


def test_what_lies_after_the_end_mark_is_not_passed_over(shard: Path) -> None:
    whole = tar_bytes({"a.txt": b"x"})
    shard.write_bytes(whole + tar_bytes({"b.txt": b"y"}))
    with pytest.raises(UserError, match=r"a\.tar continues after the end mark at byte 1024"):
        list(read_members(str(shard), MIB))
    shard.write_bytes(whole + bytes(3 * 2**20))  # some tools write long end marks
    assert [member.name for member in read_members(str(shard), MIB)] == ["a.txt"]


def test_headers_of_members_that_are_passed_over_are_not_kept(shard: Path) -> None:
    header = tarfile.TarInfo("folder")
    header.type = tarfile.DIRTYPE
    shard.write_bytes(header.tobuf() * 3_000 + bytes(1024))
    tracemalloc.start()
    try:
        assert list(read_members(str(shard), MIB)) == []
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@given(st.lists(st.text("ab./_A", min_size=1, max_size=8), max_size=12))
def test_members_are_grouped_as_webdataset_does(names: list[str]) -> None:
    members = [tars.TarMember(name, name.encode(), 0, 0) for name in names if not META.match(name)]
    theirs, ours = [], []
    try:
        theirs = list(group_by_keys({"fname": m.name, "data": m.content, "__url__": "s"} for m in members))
    except ValueError:
        with pytest.raises(UserError, match="occurs twice"):
            list(group_members(members, "s"))
    else:
        ours = list(group_members(members, "s"))
    assert ours == [dict(sample) for sample in theirs]


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
        ("a\x1b[31m.txt", {"type": tarfile.FIFOTYPE}, r"member a\\x1b\[31m\.txt is a link, a device"),
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


def block(content: bytes = b"", **changes: object) -> bytes:
    """A header with these fields, whatever they are, and its padded content."""
    header = tarfile.TarInfo("x.txt")
    header.size = len(content)
    for name, value in changes.items():
        setattr(header, name, value)
    return header.tobuf(tarfile.GNU_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def test_headers_that_extend_others_are_small_and_those_that_break_tarfile_are_named(shard: Path) -> None:
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        shard.write_bytes(block(b"x" * (tars.MOST_EXTENDED + 1), type=kind) + block() + bytes(1024))
        with pytest.raises(UserError, match="a name or attributes of 65,537 bytes"):
            list(read_members(str(shard), MIB))
    endless = block(b"99999999999999999999 path=x\n", type=tarfile.XHDTYPE)
    for damaged in (endless, 3000 * block(b"x", type=tarfile.GNUTYPE_LONGNAME)):
        shard.write_bytes(damaged + block() + bytes(1024))
        with pytest.raises(UserError, match="is not a tar file"):
            list(read_members(str(shard), MIB))


def test_two_members_of_one_name_are_refused(shard: Path) -> None:
    shard.write_bytes(tar_bytes({"a.txt": b"1", "a.TXT": b"2"}))
    with pytest.raises(UserError, match=r"a\.tar: a\.TXT occurs twice; give .*its own ending"):
        list(read_samples(str(shard), MIB))
