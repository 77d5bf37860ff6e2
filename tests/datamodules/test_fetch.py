"""Names of shards and streams of their bytes: what is opened, and above all what is refused or given up."""

import os
from pathlib import Path
from typing import Any

import pytest

from lightspan.core.errors import UserError
from lightspan.datamodules.shards import fetch
from lightspan.datamodules.shards.fetch import check_shard, expand_braces, open_shard

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
    "shard", ["pipe:touch /tmp/x", "http://host/a.tar", "PIPE:ls", "file:///etc/passwd", "sftp://host/a.tar"]
)
def test_every_scheme_but_https_and_stores_is_refused(shard: str) -> None:
    for use in (check_shard, open_shard):
        with pytest.raises(UserError, match=r"is neither a local path nor https nor .*; \w+: is refused"):
            use(shard)


@pytest.mark.parametrize("shard", ["", "a\0.tar", "https://[::1", "https://", "https://host:99999/a.tar"])
def test_what_can_be_no_name_is_refused(shard: str) -> None:
    for use in (check_shard, open_shard):
        with pytest.raises(UserError, match=r"^shard \S* is (not the name of a file|not an https address)"):
            use(shard)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.tar cannot be opened: .*No such file.*data.init_args.shards"):
        open_shard(str(tmp_path / "none.tar"))
    with pytest.raises(UserError, match=r"~nobody-of-this-name/a\.tar: .*home.*correct data\.init_args\.shards"):
        open_shard("~nobody-of-this-name/a.tar")


@pytest.mark.parametrize(("name", "kind"), [(".", "a folder"), ("/dev/zero", "a device"), ("pipe", "a named pipe")])
def test_what_is_no_regular_file_is_refused_without_waiting_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(UserError, match=rf"^shard {name} is {kind}, not a regular file"):
        open_shard(name)


def read(address: str) -> bytes:
    with open_shard(address) as stream:
        return stream.read()


def test_shards_are_read_over_https_and_nothing_leads_out_of_it(
    https_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    https_server.files["/a.tar"] = b"hello" * 5000
    address = https_server.address
    assert read(f"{address}/a.tar") == b"hello" * 5000
    with pytest.raises(UserError, match=r"none\.tar cannot be opened: .*404"):
        read(f"{address}/none.tar")
    with pytest.raises(UserError, match=r"shard http://127.0.0.1:9/a.tar is neither"):
        read(f"{address}/downgrade.tar")
    https_server.stumbles["/b.tar"] = [[b"HTTP/1.0 302 Found\r\nLocation: https://[::1\r\n\r\n"]]
    with pytest.raises(UserError, match=r"b\.tar cannot be opened: .*IPv6"):
        read(f"{address}/b.tar")
    https_server.stumbles["/b.tar"] = [[b"HTTP/1.0 302 Found\r\nLocation: s3://bucket/a.tar\r\n\r\n"]]
    with pytest.raises(UserError, match=r"b\.tar cannot be opened: .*s3://bucket/a\.tar.* is not allowed"):
        read(f"{address}/b.tar")
    https_server.stumbles["/c.tar"] = [[b"HTTP/1.0 404 \x1b[31mred\r\n\r\n"]]
    with pytest.raises(UserError, match=r"c\.tar cannot be opened: HTTP Error 404: \\x1b\[31mred; "):
        read(f"{address}/c.tar")
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(UserError, match=r"(?i)cannot be opened: .*certificate"):
        read(f"{address}/a.tar")


HEADERS = [b"HTTP/1.0 200 OK\r\n", b"Content-Length: 1000\r\n", b"\r\n"]


@pytest.mark.parametrize(
    "answer",
    [
        [*HEADERS, *[b"x"] * 30],
        [HEADERS[0], *[b"X: y\r\n"] * 30],
        [HEADERS[0], b"Transfer-Encoding: chunked\r\n\r\n", *[b"0"] * 30],
    ],
    ids=["content", "headers", "length of a chunk"],
)
def test_a_server_that_drips_is_given_up_wherever_it_drips(
    https_server: Any, monkeypatch: pytest.MonkeyPatch, answer: list[bytes]
) -> None:
    """Each byte comes long before the timeout, which alone would wait for all of them."""
    monkeypatch.setattr(fetch, "PACE_S", 0.2)
    https_server.stumbles["/a.tar"], https_server.pause_s = [answer], 0.03
    with pytest.raises((UserError, TimeoutError), match=r"the server sent \d+ bytes in 0 s, too slow to wait for"):
        read(f"{https_server.address}/a.tar")


def test_a_server_that_falls_silent_is_given_up(https_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.1)
    https_server.stumbles["/a.tar"], https_server.pause_s = [[b"".join(HEADERS), b"x"]], 0.3
    with pytest.raises((UserError, TimeoutError), match="timed out"):
        read(f"{https_server.address}/a.tar")


def test_a_slow_server_that_keeps_the_pace_is_waited_for(https_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PACE_S", 0.05)
    monkeypatch.setattr(fetch, "PACE_BYTES", 1)
    https_server.stumbles["/a.tar"], https_server.pause_s = [[b"".join(HEADERS), *[b"x" * 100] * 10]], 0.02
    assert read(f"{https_server.address}/a.tar") == b"x" * 1000
