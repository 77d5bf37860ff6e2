"""Copies of remote shards: fetched once, whole or not at all, and the oldest go first."""

import os
from pathlib import Path
from typing import Any

import pytest
from shard_files import write_shards

from lightspan.datamodules.shard_cache import ShardCache
from lightspan.datamodules.shards import Shards
from lightspan.errors import UserError


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
    with pytest.raises(UserError, match=r"a\.tar came with 1,000 bytes instead of 2,000"):
        cache.local(shard, 2000)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".tar", ".lock"}


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
        "data.init_args.shards; once more in 0.01 s"
    )
    assert said[1] == f"lightspan: shard {shard} broke off after 500 of 1,000 bytes; once more in 0.02 s"


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
