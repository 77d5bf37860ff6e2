"""The index of a shard: it finds each sample alone, and what is damaged is named down to the byte."""

import gzip
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shard_files import damage, write_shard

from lightspan.core.errors import UserError
from lightspan.core.files.foreign import BYTES
from lightspan.datamodules.shards.index import from_json, read_sample, scan

MIB = 2**20


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return Path(write_shard(tmp_path / "a.tar", range(6), index=False))


def test_each_sample_is_found_alone_and_survives_the_index_file(shard: Path) -> None:
    index, wrong = scan(shard, "a.tar", MIB)
    assert wrong is None
    assert index.size == shard.stat().st_size
    again = from_json(index.to_json(), "a.tar")
    for number in (5, 0, 3):
        sample = read_sample(again, number, shard, MIB)
        assert (sample["__key__"], sample["cls"]) == (f"{number:04}", str(number).encode())
        assert sample["png"].startswith(b"\x89PNG")
        with tarfile.open(shard) as archive:
            first = archive.getmember(f"{number:04}.png")
        assert again.starts[number] == first.offset


def test_long_names_folders_and_files_of_the_shard_itself_belong_to_no_sample(tmp_path: Path) -> None:
    path, long = tmp_path / "long.tar", "x" * 150
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("__meta__", "folder", f"{long}/a.cls", f"{long}/b.cls", "noending"):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if name == "folder" else tarfile.REGTYPE
            archive.addfile(member)
    index, wrong = scan(path, "long.tar", MIB)
    assert wrong is None
    assert [read_sample(index, number, path, MIB)["__key__"] for number in range(len(index))] == [
        f"{long}/a",
        f"{long}/b",
    ]


def test_a_changed_byte_anywhere_in_a_sample_is_named_by_sample_and_place(shard: Path) -> None:
    index, _ = scan(shard, "a.tar", MIB)
    for at in range(int(index.starts[2]), int(index.ends[2]), 97):
        whole = shard.read_bytes()
        damage(str(shard), at)
        with pytest.raises(
            UserError, match=rf"shard a\.tar: sample 2 at byte {index.starts[2]} is damaged: its CRC-32"
        ):
            read_sample(index, 2, shard, MIB)
        assert read_sample(index, 1, shard, MIB)["cls"] == b"1"
        shard.write_bytes(whole)


def test_a_sample_that_is_cut_short_or_whose_shard_is_gone_is_named(shard: Path) -> None:
    index, _ = scan(shard, "a.tar", MIB)
    shard.write_bytes(shard.read_bytes()[: int(index.ends[3]) - 1])
    assert read_sample(index, 2, shard, MIB)["cls"] == b"2"
    with pytest.raises(UserError, match=rf"sample 3 at byte {index.starts[3]} is cut short"):
        read_sample(index, 3, shard, MIB)
    shard.unlink()
    with pytest.raises(UserError, match=r"sample 0 at byte 0 cannot be read: .*No such file"):
        read_sample(index, 0, shard, MIB)


def test_a_scan_of_a_damaged_shard_keeps_the_whole_samples_before_and_says_where_it_broke(shard: Path) -> None:
    index, _ = scan(shard, "a.tar", MIB)
    shard.write_bytes(shard.read_bytes()[: int(index.ends[3]) - 512])  # inside the last member of sample 3
    short, wrong = scan(shard, "a.tar", MIB)
    assert np.array_equal(short.ends, index.ends[: len(short)])
    assert len(short) in (2, 3)  # a sample whose last member cannot be told to be the last is not trusted
    assert wrong is not None
    assert "cut short after byte" in wrong
    assert f"({len(short)} complete samples come before)" in wrong


def test_compressed_shards_are_refused_with_the_way_out(shard: Path) -> None:
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(UserError, match=r"a\.tar is compressed, .* unpack it to a plain \.tar"):
        scan(shard, "a.tar", MIB)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"starts": [0]},
        {"starts": [-512, 0], "ends": [0, 512], "crc32": [0, 0]},
        {"starts": [0, 100], "ends": [512, 1024], "crc32": [0, 0]},
        {"starts": [0], "ends": [10**12], "crc32": [0]},
        {"starts": [0], "ends": [512], "crc32": [2**40]},
        {"starts": "many"},
        {"bytes": None},
        {"sha256": "\ud800"},
        {"sha256": ["0"]},
        {"starts": [[0]], "ends": [[512]], "crc32": [[0]]},
        {"remarks": 7},
    ],
)
def test_what_is_no_index_is_refused(shard: Path, changes: dict) -> None:
    document = json.loads(scan(shard, "a.tar", MIB)[0].to_json())
    with pytest.raises(UserError, match=r"a\.tar\.index\.json is not the index of a shard .*delete it"):
        from_json(json.dumps(document | changes), "a.tar")
    with pytest.raises(UserError, match="is not the index of a shard"):
        from_json("[1, 2", "a.tar")


def test_members_of_no_sample_and_samples_that_come_again_are_said(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("__background__/0.png", "a.txt", "b.txt", "a.txt", "a.cls", "noending"):
            archive.addfile(tarfile.TarInfo(name))
    index, wrong = scan(path, "odd.tar", MIB)
    assert wrong is None
    assert [read_sample(index, number, path, MIB)["__key__"] for number in range(len(index))] == ["a", "b", "a"]
    members, again = from_json(index.to_json(), "odd.tar").remarks
    assert members.startswith("2 members belong to no sample and are skipped, the first: '__background__/0.png'")
    assert again.startswith("1 keys reappear after other samples, the first: 'a'; each time counts as a sample")


def test_joined_tars_are_damage_and_not_half_a_set(shard: Path) -> None:
    whole = shard.read_bytes()
    shard.write_bytes(whole + whole)
    index, wrong = scan(shard, "a.tar", MIB)
    assert "a.tar continues after the end mark" in str(wrong)
    assert len(index) == 5


def test_an_index_that_asks_for_more_than_there_is_reads_nothing(shard: Path) -> None:
    index, _ = scan(shard, "a.tar", MIB)
    huge = replace(index, ends=np.append(index.ends[:-1], 2**60))
    with pytest.raises(UserError, match=r"sample 5 at byte .* is cut short"):
        read_sample(huge, 5, shard, MIB)


def test_a_sample_that_an_index_makes_as_large_as_a_sparse_shard_is_not_read(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, _ = scan(shard, "a.tar", MIB)
    first = int(index.ends[0] - index.starts[0])
    for most in (first, first - 1):
        monkeypatch.setenv(BYTES.setting, str(most))
        if most == first:
            assert read_sample(index, 0, shard, MIB)["cls"] == b"0"
        else:
            with pytest.raises(UserError, match=r"sample 0 at byte 0 cannot be read: it has .* LIGHTSPAN_MAX_BYTES"):
                read_sample(index, 0, shard, MIB)
