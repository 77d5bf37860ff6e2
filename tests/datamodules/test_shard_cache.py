"""Copies of remote shards: fetched once, whole or not at all, and the oldest go first."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from shard_files import damage, write_shard, write_shards

from lightspan.core.errors import UserError
from lightspan.core.files import attempts
from lightspan.core.files.atomic import temporary_path
from lightspan.core.files.caches import isolated_caches
from lightspan.datamodules.shards import cache as shard_cache
from lightspan.datamodules.shards import fetch
from lightspan.datamodules.shards.cache import ShardCache
from lightspan.datamodules.shards.stream import Shards


def test_local_shards_stay_where_they_are(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 0)
    assert cache.local(str(tmp_path / "a.tar")) == tmp_path / "a.tar"
    assert not (tmp_path / "cache").exists()


def test_a_copy_is_fetched_once_and_anew_where_its_size_is_wrong(https_server: Any, tmp_path: Path) -> None:
    cache, shard = ShardCache(str(tmp_path / "cache"), 10**6), f"{https_server.address}/a.tar"
    https_server.files["/a.tar"] = b"x" * 1000
    assert cache.local(shard, 1000).read_bytes() == b"x" * 1000
    cache.local(shard, 1000).write_bytes(b"cut")
    cache.local(shard)
    assert https_server.asked == ["/a.tar"]
    assert cache.local(shard, 1000).read_bytes() == b"x" * 1000
    with pytest.raises(UserError, match=r"a\.tar has 1,000 bytes instead of 2,000"):
        cache.local(shard, 2000)
    assert kept(tmp_path / "cache") == [".tar"]


def test_a_server_that_stumbles_is_asked_again_and_the_address_is_named(
    https_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, shard = ShardCache(str(tmp_path / "cache"), 10**6), f"{https_server.address}/a.tar"
    https_server.files["/a.tar"] = b"x" * 1000
    https_server.stumbles["/a.tar"] = [503, "cut", 429]
    assert cache.local(shard).read_bytes() == b"x" * 1000
    assert https_server.asked == ["/a.tar"] * 4
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert said[0] == f"lightspan: shard {shard} cannot be opened: HTTP Error 503: Service Unavailable; correct " + (
        "data.init_args.shards; trying again in 0.01 s"
    )
    assert said[1] == f"lightspan: shard {shard} ended after 500 of 1,000 bytes; trying again in 0.02 s"


def test_attempts_end_and_what_a_server_refuses_is_asked_for_once(https_server: Any, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 10**6)
    https_server.stumbles["/a.tar"] = [500] * 9
    with pytest.raises(UserError, match=r"/a\.tar cannot be opened: HTTP Error 500.*\(attempt 4, the last\)"):
        cache.local(f"{https_server.address}/a.tar")
    with pytest.raises(UserError, match=r"/b\.tar cannot be opened: HTTP Error 404"):
        cache.local(f"{https_server.address}/b.tar")
    assert https_server.asked == [*["/a.tar"] * 4, "/b.tar"]


def test_copies_used_longest_ago_are_deleted_but_none_in_use(https_server: Any, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 2500)
    names = "abcd"
    https_server.files |= {f"/{name}.tar": name.encode() * 1000 for name in names}
    copies = {name: cache.local(f"{https_server.address}/{name}.tar") for name in names[:3]}
    assert all(copy.exists() for copy in copies.values())  # all were used in the last minute
    for age, name in ((900, "b"), (600, "a"), (300, "c")):
        then = os.stat(copies[name]).st_mtime - age
        os.utime(copies[name], (then, then))
    cache.local(f"{https_server.address}/d.tar")
    assert [name for name in names[:3] if copies[name].exists()] == ["c"]


def test_training_reads_remote_shards_with_and_without_an_index(https_server: Any, tmp_path: Path) -> None:
    for shard in write_shards(tmp_path, [5, 4]):
        https_server.files[f"/{Path(shard).name}"] = Path(shard).read_bytes()
    index = (tmp_path / "part-0.tar.index.json").read_bytes()
    https_server.files["/part-0.tar.index.json"] = index
    data = Shards([f"{https_server.address}/part-{{0..1}}.tar"], batch_size=9, cache_dir=str(tmp_path / "cache"))
    data.setup()
    (batch,) = data.train_dataloader()
    assert sorted(batch["label"].tolist()) == list(range(9))
    assert sorted(batch["index"].tolist()) == list(range(9))
    asked = [path for path in https_server.asked if path.endswith(".tar")]
    assert sorted(asked) == ["/part-0.tar", "/part-1.tar"]


def test_a_remote_shard_that_is_not_there_may_be_skipped_but_a_silent_server_may_not(
    https_server: Any, tmp_path: Path
) -> None:
    (shard,) = write_shards(tmp_path, [4])
    https_server.files["/part-0.tar"] = Path(shard).read_bytes()
    names = [f"{https_server.address}/{name}.tar" for name in ("part-0", "none")]
    data = Shards(names, batch_size=4, skip_damaged=True, cache_dir=str(tmp_path / "cache"))
    data.setup()
    assert data.train is not None
    assert len(data.train) == 4
    assert "none.tar is missing" in data.train.damage[0]
    silent = Shards([names[0], "https://127.0.0.1:9/a.tar"], skip_damaged=True, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"https://127\.0\.0\.1:9/a\.tar\S* cannot be opened: .*refused"):
        silent.setup()


def test_without_room_for_copies_a_sample_is_one_request_for_its_own_bytes(https_server: Any, tmp_path: Path) -> None:
    write_shards(tmp_path, [5])
    for path in tmp_path.iterdir():
        https_server.files[f"/{path.name}"] = path.read_bytes()
    data = Shards([f"{https_server.address}/part-0.tar"], batch_size=5, cache_gib=0, cache_dir=str(tmp_path / "cache"))
    data.setup()
    assert data.train is not None
    https_server.asked.clear()
    https_server.stumbles["/part-0.tar"] = [503, "cut"]
    assert [data.train.sample(number, 0)["label"] for number in range(5)] == [0, 1, 2, 3, 4]
    assert https_server.asked == ["/part-0.tar"] * 7
    assert not (tmp_path / "cache").exists()
    https_server.ranges = False
    with pytest.raises(UserError, match=r"part-0\.tar cannot be read in parts, .*cache_gib"):
        data.train.sample(0, 0)


# What a server may do


def kept(folder: Path) -> list[str]:
    (part,) = (path for path in folder.iterdir() if path.is_dir())
    return [path.suffix for path in part.iterdir() if path.suffix != ".lock"]


def test_what_is_not_what_the_index_says_never_becomes_a_copy(https_server: Any, tmp_path: Path) -> None:
    cache, shard = ShardCache(str(tmp_path / "cache"), 10**6), f"{https_server.address}/a.tar"
    https_server.files["/a.tar"] = b"x" * 1000
    with pytest.raises(UserError, match=r"a\.tar has sha256 \w+, but its index says 00; write shard and index again"):
        cache.local(shard, 1000, "00")
    assert kept(tmp_path / "cache") == []
    assert cache.local(shard, 1000, hashlib.sha256(b"x" * 1000).hexdigest()).read_bytes() == b"x" * 1000


def test_a_copy_that_proves_bad_is_fetched_again_unless_it_is_as_it_should_be(
    https_server: Any, tmp_path: Path
) -> None:
    cache, shard = ShardCache(str(tmp_path / "cache"), 10**6), f"{https_server.address}/a.tar"
    https_server.files["/a.tar"] = b"x" * 1000
    digest = hashlib.sha256(b"x" * 1000).hexdigest()
    copy = cache.local(shard)
    assert cache.renewed(shard, digest) is None
    copy.write_bytes(b"y" * 1000)
    assert cache.renewed(shard, digest) == copy
    assert copy.read_bytes() == b"x" * 1000
    assert https_server.asked == ["/a.tar"] * 2
    assert cache.renewed(str(copy)) is None  # a local shard


def test_no_server_fills_the_disk(https_server: Any, tmp_path: Path) -> None:
    cache, shard = ShardCache(str(tmp_path / "cache"), 2500), f"{https_server.address}/a.tar"
    https_server.stumbles["/a.tar"] = [[b"HTTP/1.0 200 OK\r\n\r\n", *[b"x" * 1000] * 50]]
    with pytest.raises(UserError, match=r"a\.tar does not state its size and does not end, above .* 2,500 .*cache_gib"):
        cache.local(shard)
    https_server.stumbles["/a.tar"] = [[b"HTTP/1.0 200 OK\r\n\r\n", *[b"x" * 1000] * 50]]
    with pytest.raises(UserError, match=r"a\.tar has more than 1,000 bytes instead of 1,000"):
        cache.local(shard, 1000)
    https_server.files["/a.tar"] = b"x" * 5000
    with pytest.raises(UserError, match=r"a\.tar has 5,000 bytes, above the limit of 2,500 bytes for all copies"):
        cache.local(shard)
    assert kept(tmp_path / "cache") == []


def test_room_is_made_before_a_shard_is_fetched_and_counts_what_is_under_way(https_server: Any, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 2500)
    https_server.files |= {f"/{name}.tar": b"x" * 1000 for name in "ab"}
    first = cache.local(f"{https_server.address}/a.tar")
    folder = first.parent
    os.utime(first, (1, 1))
    (folder / f".lightspan-1234-{0:032x}.tar.tmp").write_bytes(b"x" * 1000)  # of another process
    abandoned = folder / f".lightspan-5678-{1:032x}.tar.tmp"
    abandoned.write_bytes(b"x" * 100)
    os.utime(abandoned, (0, 0))
    https_server.stumbles["/b.tar"] = ["cut"]
    room = []
    fetch_block = shard_cache._next_block

    def observed(*arguments: Any) -> bytes:
        room.append(first.exists())
        return fetch_block(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_cache, "_next_block", observed)
        cache.local(f"{https_server.address}/b.tar")
    assert not any(room)
    assert not abandoned.exists()
    assert (folder / f".lightspan-1234-{0:032x}.tar.tmp").exists()


def test_what_a_killed_process_left_of_a_shard_goes_when_it_is_fetched(https_server: Any, tmp_path: Path) -> None:
    cache, shard = ShardCache(str(tmp_path / "cache"), 2500), f"{https_server.address}/a.tar"
    https_server.files["/a.tar"] = b"x" * 1000
    copy = cache.local(shard)
    temporary_path(copy, "1234").write_bytes(b"x" * 500)
    cache.renewed(shard)
    assert kept(tmp_path / "cache") == [".tar"]


def test_a_server_that_drips_a_shard_is_given_up(
    https_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PACE_S", 0.1)
    monkeypatch.setattr(attempts, "PAUSES_S", ())
    answer = [b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n", *[b"x"] * 30]
    https_server.stumbles["/a.tar"], https_server.pause_s = [answer], 0.02
    with pytest.raises(UserError, match=r"a\.tar could not be downloaded completely: the server sent \d+ bytes in 0 s"):
        ShardCache(str(tmp_path / "cache"), 10**6).local(f"{https_server.address}/a.tar")
    assert kept(tmp_path / "cache") == []


def test_a_full_disk_is_told_with_the_setting_that_chose_it(
    https_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    https_server.files["/a.tar"] = b"x" * 1000
    monkeypatch.setattr(ShardCache, "_make_room", full)
    with pytest.raises(UserError, match=r"the disk is full .* on another disk with data\.init_args\.cache_dir$"):
        ShardCache(str(tmp_path / "cache"), 10**6).local(f"{https_server.address}/a.tar")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make folder .* with data\.init_args\.cache_dir$"):
        ShardCache(str(tmp_path / "file"), 10**6).local(f"{https_server.address}/a.tar")


PAGE = [b"HTTP/1.0 200 OK\r\n\r\n", b"<html>come back later</html>"]


def remote(https_server: Any, tmp_path: Path, **more: Any) -> Shards:
    data = Shards([f"{https_server.address}/part-0.tar"], batch_size=4, cache_dir=str(tmp_path / "cache"), **more)
    data.trainer = Trainer(accelerator="cpu", devices=1, logger=False, barebones=True, default_root_dir=tmp_path)
    return data


def test_a_page_instead_of_a_shard_is_not_cached_for_ever(https_server: Any, tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [4])
    https_server.files["/part-0.tar"] = Path(shard).read_bytes()
    https_server.stumbles["/part-0.tar"] = [PAGE]
    data = remote(https_server, tmp_path)
    data.setup()
    assert data.train is not None
    assert len(data.train) == 4
    https_server.stumbles["/part-1.tar"] = [PAGE, PAGE]
    data = Shards([f"{https_server.address}/part-1.tar"], cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=rf"not a tar file.*fetched twice, and the copy is {tmp_path}/cache/\w+/\w+\.t"):
        data.setup()
    https_server.files["/part-1.tar"] = https_server.files["/part-0.tar"]
    data.setup()


def test_a_copy_that_rots_is_fetched_again_once(https_server: Any, tmp_path: Path) -> None:
    write_shards(tmp_path, [4])
    for name in ("part-0.tar", "part-0.tar.index.json"):
        https_server.files[f"/{name}"] = (tmp_path / name).read_bytes()
    data = remote(https_server, tmp_path)
    data.setup()
    assert data.train is not None
    data.train.sample(0, 0)
    (copy,) = (tmp_path / "cache").glob("*/*.tar")
    damage(str(copy), 600)
    assert data.train.sample(0, 0)["label"] == 0
    assert https_server.asked.count("/part-0.tar") == 2
    index = json.loads(https_server.files["/part-0.tar.index.json"])
    https_server.files["/part-0.tar.index.json"] = json.dumps(index | {"crc32": [0] * 4}).encode()
    wrong = remote(https_server, tmp_path)  # its index, not its copy: fetching again would not help
    wrong.setup()
    assert wrong.train is not None
    with pytest.raises(UserError, match="is damaged: its CRC-32"):
        wrong.train.sample(0, 0)
    assert https_server.asked.count("/part-0.tar") == 2


def test_a_remote_shard_that_was_scanned_is_not_fetched_to_be_counted_again(https_server: Any, tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [4])
    https_server.files["/part-0.tar"] = Path(shard).read_bytes()
    remote(https_server, tmp_path).setup()
    for copy in (tmp_path / "cache").glob("*/*.tar"):
        copy.unlink()
    again = remote(https_server, tmp_path)
    again.setup()
    assert https_server.asked.count("/part-0.tar") == 1
    https_server.files["/part-0.tar"] = Path(write_shard(tmp_path / "other.tar", range(4, 8))).read_bytes()
    assert again.train is not None
    with pytest.raises(UserError, match="has sha256"):
        again.train.sample(0, 0)


def test_a_dry_run_reads_the_copy_that_is_there_and_fetches_others_elsewhere(https_server: Any, tmp_path: Path) -> None:
    https_server.files |= {f"/{name}.tar": b"x" * 1000 for name in "ab"}
    copy = ShardCache(str(tmp_path / "cache"), 1500).local(f"{https_server.address}/a.tar")
    os.utime(copy, (1, 1))
    with isolated_caches(tmp_path / "apart"):
        cache = ShardCache(str(tmp_path / "cache"), 1500)
        assert cache.local(f"{https_server.address}/a.tar", 1000) == copy
        assert tmp_path / "apart" in cache.local(f"{https_server.address}/b.tar").parents
    assert kept(tmp_path / "cache") == [".tar"]
    assert copy.stat().st_atime == 1
    assert https_server.asked == ["/a.tar", "/b.tar"]
