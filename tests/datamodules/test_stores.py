"""Shards in an object store are what they are in a folder, bit for bit, and whatever the store does is named.

The store is moto's server of S3 in this process, behind a gate that stumbles as a test tells it.
"""

import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from shard_files import damage, write_shards
from store_fixtures import KEY, SECRET, Gate, put
from torch import Tensor

from lightspan.cli.main import main
from lightspan.core.errors import UserError
from lightspan.core.files import stores
from lightspan.core.files.attempts import FetchError, retried
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.shards.cache import ShardCache
from lightspan.datamodules.shards.fetch import check_shard, open_shard, read_span
from lightspan.datamodules.shards.stream import Shards

s3fs = pytest.importorskip("s3fs", reason="the extra `cloud` is not installed")
pytest.importorskip("moto.server", reason="the extra `peers` is not installed")


def upload(folder: Path, prefix: str = ".") -> None:
    for path in folder.iterdir():
        if path.is_file():
            put(str(Path(prefix, path.name)), path.read_bytes())


def batches(data: Shards, ranks: int = 1) -> list[dict[str, Tensor]]:
    """Two epochs of an ExactLoader for each of the ranks, whose batches are joined."""
    data.setup()
    assert data.train is not None
    order = data.train.order(data.window)
    loaders = [
        ExactLoader(data.train, data.batch_size, data.seed, rank, ranks, num_workers=data.num_workers, order=order)
        for rank in range(ranks)
    ]
    seen = []
    for _ in range(2):
        for parts in zip(*(map(tensors, loader) for loader in loaders), strict=True):
            seen.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return seen


def tensors(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Each view under a name of its own."""
    views = {f"view {number}": view for number, view in enumerate(batch.get("views", ()))}
    return {name: value for name, value in batch.items() if name != "views"} | views


def require_equal(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert [batch["index"].tolist() for batch in found] == [batch["index"].tolist() for batch in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def read(gate: Gate, method: str = "GET") -> list[str]:
    return [path for asked, path, _ in gate.asked if asked == method]


# The same data


def test_an_object_is_read_whole_or_in_parts(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, empty = put("a.tar", b"hello" * 5000), put("empty.tar", b"")
    monkeypatch.setattr(stores, "BLOCK_BYTES", 7000)
    gate.asked.clear()
    with open_shard(shard) as stream:
        assert stream.read(3) + stream.read(9000) + stream.read() == b"hello" * 5000
        assert stream.read(1) == b""
    spans = ["", "bytes=0-6999", "bytes=7000-13999", "bytes=14000-20999", "bytes=21000-24999", ""]
    assert [span for _, _, span in gate.asked] == spans
    gate.asked.clear()
    assert read_span(shard, 5, 10) == b"hello"
    assert gate.asked == [("GET", "/lab/a.tar", "bytes=5-9")]
    with open_shard(empty) as stream:
        assert stream.read() == b""


@pytest.mark.parametrize(("cache_gib", "workers", "ranks"), [(1, 0, 2), (0, 0, 1), (0, 2, 1), (0, 0, 2)])
def test_a_bucket_gives_the_batches_of_a_folder_bit_for_bit_on_one_rank_and_on_two(
    gate: Gate, tmp_path: Path, cache_gib: float, workers: int, ranks: int
) -> None:
    """7, 0 and 8 samples in batches of 4; two random views of each; workers are forked after the store was used."""
    names = [Path(shard).name for shard in write_shards(tmp_path, [7, 0, 8])]
    upload(tmp_path)
    settings: dict[str, Any] = {"batch_size": 4, "window": 2, "seed": 5, "views": RandomViews(count=2, size=4)}
    local = Shards([str(tmp_path / name) for name in names], **settings)
    more = {"cache_gib": cache_gib, "cache_dir": str(tmp_path / "cache"), "num_workers": workers}
    remote = Shards([f"s3://lab/{name}" for name in names], **settings, **more)
    require_equal(batches(remote, ranks), batches(local))
    assert (tmp_path / "cache").exists() == (cache_gib > 0)


def test_a_run_that_stops_in_a_folder_continues_in_a_bucket(gate: Gate, tmp_path: Path) -> None:
    names = [Path(shard).name for shard in write_shards(tmp_path, [7, 8])]
    upload(tmp_path)

    def loader(root: str) -> ExactLoader:
        data = Shards([f"{root}/{name}" for name in names], batch_size=2, cache_gib=0)
        data.setup()
        assert data.train is not None
        return ExactLoader(data.train, 2, 0, order=data.train.order(16))

    straight, stopped, resumed = loader(str(tmp_path)), loader(str(tmp_path)), loader("s3://lab")
    first = [batch for _, batch in zip(range(3), stopped, strict=False)]
    resumed.load_state_dict(stopped.state_dict())
    require_equal([*first, *resumed], list(straight))


def test_indices_alone_are_read_to_draw_the_order(gate: Gate, tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 4])
    upload(tmp_path)
    gate.asked.clear()
    Shards(["s3://lab/part-{0..1}.tar"], batch_size=2, cache_gib=0).setup()
    assert sorted(read(gate)) == ["/lab/part-0.tar.index.json", "/lab/part-1.tar.index.json"]


def test_a_shard_without_an_index_is_scanned_in_its_copy_and_needs_one(gate: Gate, tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [5])
    put("part-0.tar", Path(shard).read_bytes())
    copied = Shards(["s3://lab/part-0.tar"], batch_size=5, cache_dir=str(tmp_path / "cache"))
    require_equal(batches(copied), batches(Shards([shard], batch_size=5)))
    with pytest.raises(UserError, match=r"part-0\.tar has no index.*`lightspan data index`.*cache_gib"):
        Shards(["s3://lab/part-0.tar"], batch_size=5, cache_gib=0).setup()


# What a store may do


def test_what_may_pass_is_asked_for_again_and_told(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    shard = put("a.tar", b"x" * 1000)
    gate.asked.clear()
    gate.stumbles["/lab/a.tar"] = [503, "cut", (503, "SlowDown")]
    assert retried(lambda: read_span(shard, 0, 1000)) == b"x" * 1000
    assert len(gate.asked) == 4  # the library makes no attempts of its own
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert all(line.startswith(f"lightspan: shard {shard}, bytes 0 to 1,000, cannot be read: ") for line in said)


@pytest.mark.parametrize(
    ("stumble", "message", "attempts"),
    [
        ((404, "NoSuchKey"), "the store has no such object", 1),
        ((403, "AccessDenied"), "the store refuses it .*keys", 1),
        ((403, "InvalidAccessKeyId"), "the store refuses it .*keys", 1),
        ((400, "ExpiredToken"), "the store refuses it .*keys may be missing, wrong, expired", 1),
        ((503, "SlowDown"), r"no \(attempt 4, the last\)", 4),
        (500, r"Internal Server Error.*\(attempt 4, the last\)", 4),
        ("cut", r"received 500 of 1000.*\(attempt 4, the last\)", 4),
        ("silent", r"the store is silent, or too slow to wait for \(attempt 4, the last\)", 4),
        ("drip", r"the store is silent, or too slow to wait for \(attempt 4, the last\)", 4),
    ],
)
def test_what_stays_wrong_is_named_without_a_key(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, stumble: Any, message: str, attempts: int
) -> None:
    shard = put("a.tar", b"x" * 1000)
    monkeypatch.setattr(stores, "TIMEOUT_S", 0.3 if stumble in ("silent", "drip") else 20.0)
    gate.stumbles["/lab/a.tar"] = [stumble] * 9
    gate.asked.clear()
    with pytest.raises(FetchError, match=rf"^shard {shard}, bytes 0 to 1,000, cannot be read: .*{message}") as caught:
        retried(lambda: read_span(shard, 0, 1000))
    assert attempts - (stumble == "silent") <= len(gate.asked) <= attempts  # an attempt may end before it is heard
    said = "".join(traceback.format_exception(caught.value))
    assert KEY not in said
    assert SECRET not in said


def test_keys_that_are_lost_are_named(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = put("a.tar", b"x" * 1000)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(FetchError, match=r"a\.tar, bytes 0 to 9, cannot be read: .*credentials"):
        retried(lambda: read_span(shard, 0, 9))
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_missing_bucket_and_a_folder_are_no_objects(gate: Gate) -> None:
    put("folder/a.tar", b"")
    for address in ("s3://none/a.tar", "s3://lab/folder", "s3://lab/b.tar"):
        with pytest.raises(UserError, match=rf"^shard {address} cannot be opened: .*no (such )?object"):
            open_shard(address)


def test_an_object_of_another_size_than_its_index_says_is_refused(gate: Gate, tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [4])
    upload(tmp_path)
    put("part-0.tar", Path(shard).read_bytes()[:3000])
    copied, parts = (
        Shards(
            ["s3://lab/part-0.tar"], batch_size=4, skip_damaged=True, cache_gib=gib, cache_dir=str(tmp_path / "cache")
        )
        for gib in (1, 0)
    )
    for data, message in ((copied, "has 3,000 bytes instead of [0-9,]+"), (parts, "cannot be read: ")):
        data.setup()
        assert data.train is not None
        with pytest.raises(FetchError, match=rf"^shard s3://lab/part-0\.tar.* {message}"):
            data.train.sample(3, 0)
    assert parts.train is not None
    assert parts.train.sample(0, 0)["label"] == 0


@pytest.mark.parametrize("cache_gib", [0, 1])
def test_a_sample_is_left_out_for_its_damage_and_not_for_the_network(
    gate: Gate, tmp_path: Path, cache_gib: float
) -> None:
    (shard,) = write_shards(tmp_path, [6])
    content = Path(shard).read_bytes()
    damage(shard, 600)
    upload(tmp_path)
    settings: dict[str, Any] = {"batch_size": 6, "skip_damaged": True}
    remote = Shards(["s3://lab/part-0.tar"], **settings, cache_gib=cache_gib, cache_dir=str(tmp_path / "cache"))
    if cache_gib == 0:
        require_equal(batches(remote), batches(Shards([shard], **settings)))
    else:  # a whole copy has a sha256 that says so before
        with pytest.raises(FetchError, match="has sha256"):
            remote.setup() or remote.train.sample(1, 0)  # type: ignore[union-attr, func-returns-value]
    put("part-0.tar", content)
    gate.stumbles["/lab/part-0.tar"] = [(403, "AccessDenied")] * 9
    remote.setup()
    assert remote.train is not None
    with pytest.raises(FetchError, match=r"the store refuses it|cannot be opened"):
        remote.train.sample(1, 0)


def test_a_sample_that_arrives_wrong_is_read_once_more(gate: Gate, tmp_path: Path) -> None:
    write_shards(tmp_path, [4])
    upload(tmp_path)
    data = Shards(["s3://lab/part-0.tar"], batch_size=4, cache_gib=0)
    data.setup()
    assert data.train is not None
    gate.stumbles["/lab/part-0.tar"] = ["flip"]
    gate.asked.clear()
    assert data.train.sample(2, 0)["label"] == 2
    assert len(gate.asked) == 2


def test_a_missing_shard_of_a_bucket_may_be_left_out_but_one_that_is_refused_may_not(
    gate: Gate, tmp_path: Path
) -> None:
    write_shards(tmp_path, [4])
    upload(tmp_path)
    settings: dict[str, Any] = {"batch_size": 4, "skip_damaged": True, "cache_dir": str(tmp_path / "cache")}
    data = Shards(["s3://lab/part-0.tar", "s3://lab/none.tar"], **settings)
    data.setup()
    assert data.train is not None
    assert len(data.train) == 4
    assert "s3://lab/none.tar is missing" in data.train.damage[0]
    gate.stumbles["/lab/none.tar.index.json"] = [403] * 9
    with pytest.raises(UserError, match=r"none\.tar\.index\.json cannot be opened: the store refuses it .*keys"):
        Shards(["s3://lab/part-0.tar", "s3://lab/none.tar"], **settings).setup()


def test_an_object_that_is_replaced_while_it_is_read_is_no_mixture_of_both(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shard = put("a.tar", b"a" * 20000)
    monkeypatch.setattr(stores, "BLOCK_BYTES", 7000)
    with open_shard(shard) as stream:
        assert stream.read(7000) == b"a" * 7000
        put("a.tar", b"b" * 20000)
        with pytest.raises(ConnectionError, match="replaced"):
            stream.read()
    size_told, read_range = [put("a.tar", b"c" * 20000)], stores.read_range

    def replaced(address: str, start: int, end: int) -> bytes:
        content = read_range(address, start, end)
        if start and size_told:
            put(size_told.pop().removeprefix("s3://lab/"), b"d" * 20000)
        return content

    monkeypatch.setattr(stores, "read_range", replaced)
    copy = ShardCache(str(tmp_path / "cache"), 2**20).local(shard)
    assert copy.read_bytes() == b"d" * 20000


def test_a_shard_above_the_limit_of_copies_is_not_fetched(gate: Gate, tmp_path: Path) -> None:
    shard = put("a.tar", b"x" * 5000)
    gate.asked.clear()
    with pytest.raises(UserError, match=r"a\.tar has 5,000 bytes, above the limit of 2,500 .*cache_gib"):
        ShardCache(str(tmp_path / "cache"), 2500).local(shard)
    assert read(gate) == []


# `lightspan data`


def test_verify_names_what_is_missing_changed_or_strange_in_a_bucket(
    gate: Gate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcdef":
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), name == "a").save(tmp_path / "in" / name / "0.png")
    assert main(["data", "pack", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--shard-size", "5K"]) == 0
    upload(tmp_path / "out", "packed")
    assert main(["data", "verify", "s3://lab/packed"]) == 0
    damage(str(tmp_path / "out" / "00001.tar"), 600)
    upload(tmp_path / "out", "packed")
    put("packed/00009.tar", b"")
    s3fs.S3FileSystem().rm("lab/packed/00000.tar")
    capsys.readouterr()
    assert main(["data", "verify", "s3://lab/packed/"]) == 1
    printed = capsys.readouterr().out
    assert "s3://lab/packed/00000.tar cannot be read (No such file or directory)" in printed
    assert "s3://lab/packed/00001.tar: its sha256 is not the recorded one; 1 of " in printed
    assert "samples are damaged: 0 (byte 0)" in printed
    assert "s3://lab/packed/00009.tar: was not written by `data pack`" in printed
    gate.stumbles["/lab/packed/SHA256SUMS"] = [403] * 9
    assert main(["data", "verify", "s3://lab/packed"]) == 2
    assert "the store refuses it" in capsys.readouterr().err
    assert main(["data", "verify", "s3://lab/none"]) == 2
    assert "s3://lab/none/SHA256SUMS cannot be read (No such file" in capsys.readouterr().err


def test_index_writes_what_is_missing_beside_the_shards_of_a_bucket(
    gate: Gate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path, [3, 4])
    written = (tmp_path / "part-1.tar.index.json").read_text()
    (tmp_path / "part-1.tar.index.json").unlink()
    upload(tmp_path)
    assert main(["data", "index", "s3://lab"]) == 0
    assert "s3://lab: wrote the index of 1 shards with 4 samples" in capsys.readouterr().out
    assert s3fs.S3FileSystem().cat_file("lab/part-1.tar.index.json").decode() == written
    assert batches(Shards(["s3://lab/part-{0..1}.tar"], batch_size=7, cache_gib=0))
    for place, message in (
        ("s3://none", "cannot be listed: the store has no such object"),
        ("s3://lab/part-0.tar", "contains no .tar file"),
        ("https://127.0.0.1:9/a", "data index looks at a folder, not at"),
        (f"s3://{KEY}:{SECRET}@lab/a", "key in it"),
    ):
        assert main(["data", "index", place]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert KEY not in error


@pytest.mark.runs
def test_a_run_on_a_bucket_writes_no_key_down(gate: Gate, tmp_path: Path) -> None:
    """Three steps on two workers; then the keys are not accepted any more, and the run says so in a line."""
    write_shards(tmp_path, [5, 4])
    upload(tmp_path)
    backbone = {"class_path": "lightspan.backbones.vision.MLP", "init_args": {"in_shape": [3, 4, 4], "hidden": [8]}}
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    classifier = {"backbone": backbone, "num_classes": 9, "optimizer": optimizer}
    data = {"shards": ["s3://lab/part-{0..1}.tar"], "batch_size": 4, "image_size": 4, "cache_gib": 0, "num_workers": 2}
    recipe = {
        "base": "defaults",
        "trainer": {"accelerator": "cpu", "max_steps": 3},
        "model": {"class_path": "lightspan.methods.supervised.classifier.Classifier", "init_args": classifier},
        "data": {"class_path": "lightspan.datamodules.shards.stream.Shards", "init_args": data},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))

    def fit(run: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lightspan", "fit", "own.yaml", "--run", run]
        environment = {**os.environ, "HOME": str(tmp_path / "home")}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        for key in (KEY, SECRET):
            assert key not in done.stdout + done.stderr
            assert not [content for content in files if key.encode() in content]
        return done

    done = fit("run")
    assert done.returncode == 0, done.stderr
    assert "nclosed" not in done.stderr  # as aiohttp says of connections that nobody closes
    assert len([span for _, path, span in gate.asked if path.endswith(".tar") and span]) >= 12
    gate.stumbles["/lab/part-1.tar"] = [(403, "ExpiredToken")] * 50
    done = fit("again")
    assert done.returncode == 2
    assert "shard s3://lab/part-1.tar" in done.stderr
    assert "the store refuses it" in done.stderr
    assert "Traceback" not in done.stderr


# Addresses


def test_an_address_has_no_key_and_leads_to_one_object(gate: Gate) -> None:
    for address in (f"s3://{KEY}:{SECRET}@lab/a.tar", f"s3://{KEY}:{SECRET.replace('/', '%2F')}@lab/a.tar"):
        with pytest.raises(UserError, match="key in it") as caught:
            check_shard(address)
        assert KEY not in str(caught.value)
    for address in ("s3://", "s3://lab", "s3:///a.tar", "s3://[::1", "s3://lab/a.zip::zip://b", "s3:lab/a.tar"):
        with pytest.raises(UserError, match=r"is not the address of an object; write s3://BUCKET/NAME"):
            check_shard(address)
    for address in ("zip://a::s3://lab/b", "simplecache::s3://lab/a.tar", "memory://a.tar", "local:///etc/passwd"):
        with pytest.raises(UserError, match="is neither a local path nor https nor in a store"):
            check_shard(address)
    check_shard("gs://lab/a.tar")
    check_shard("abfs://box@account.dfs.core.windows.net/a.tar")


def test_a_store_whose_package_is_missing_says_what_to_install(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **more: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.filesystem", missing)
    with pytest.raises(UserError, match=r"Install s3fs.*pip install '\.\[cloud\]'"):
        open_shard("s3://lab/a.tar")
