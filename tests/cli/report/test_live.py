"""The page of `lightspan watch`: it follows its runs, and gives nothing else away, to nobody else."""

import contextlib
import http.client
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from run_folder_fixtures import MakeRun
from waiting import HANG_S, wait_until

from lightspan.cli.report import live
from lightspan.cli.report.live import Live, LiveServer
from lightspan.core.errors import UserError


@pytest.fixture(autouse=True)
def _without_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests change a run and look at once."""
    monkeypatch.setattr(live, "REST", 0.0)


@pytest.fixture
def served() -> Iterator[Callable[[Live], LiveServer]]:
    servers: list[LiveServer] = []

    def serve(page: Live) -> LiveServer:
        server = LiveServer(page)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(server: LiveServer, path: str = "", method: str = "GET", host: str | None = "") -> tuple[int, str, bytes]:
    """(status, content security policy, body); `path` below the token, or from the root with a leading /."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=HANG_S)
    whole = path if path.startswith("/") else f"/{server.token}/{path}"
    connection.putrequest(method, whole, skip_host=True)
    if host is not None:
        connection.putheader("Host", host or f"127.0.0.1:{server.server_address[1]}")
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.getheader("Content-Security-Policy") or "", answer.read()


def raw(server: LiveServer, request: bytes) -> bytes:
    with socket.create_connection(server.server_address, timeout=HANG_S) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_the_page_is_the_report_with_one_script_that_nothing_else_can_become(
    make_run: MakeRun, served: Callable[[Live], LiveServer]
) -> None:
    server = served(Live([make_run("a")]))
    status, policy, page = ask(server)
    assert status == 200
    assert b"<b>val/loss_nats</b>" in page
    (nonce,) = {part.split(b'"')[0] for part in page.split(b'<script nonce="')[1:]}
    assert page.count(b"<script") == 1
    assert f"script-src 'nonce-{nonce.decode()}'" in policy
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert f"script-src 'nonce-{nonce.decode()}'".encode() in page
    assert server.address.startswith("http://127.0.0.1:")


def test_the_version_changes_with_the_files_and_the_page_is_rendered_once_for_each(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("a")
    page = Live([run])
    rendered = []
    original = Live._rendered
    monkeypatch.setattr(Live, "_rendered", lambda self: (rendered.append(1), original(self))[1])
    first = page.version()
    assert page.page() == page.page()
    assert (page.version(), len(rendered)) == (first, 1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "time_s": 5.0, "val/new": 2.0}\n')
    assert page.version() != first
    assert b"<b>val/new</b>" in page.page()
    second = page.version()
    (run / "failed.txt").write_text("loss is NaN")
    assert page.version() != second
    assert b">failed</span>" in page.page()
    assert len(rendered) == 3


def test_head_has_no_body_and_other_methods_do_not_exist(
    make_run: MakeRun, served: Callable[[Live], LiveServer]
) -> None:
    server = served(Live([make_run("a")]))
    assert ask(server, method="HEAD")[::2] == (200, b"")
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "<script>"):
        status, _, body = ask(server, method=method)
        assert status == 501
        assert b"<script>" not in body


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "evil.example:{}", "127.0.0.1:{}.evil", None]
)
def test_a_request_that_names_another_host_gets_nothing(
    make_run: MakeRun, served: Callable[[Live], LiveServer], host: str | None
) -> None:
    server = served(Live([make_run("a")]))
    port = server.server_address[1]
    for path in ("", "version"):
        status, _, body = ask(server, path, host=None if host is None else host.format(port))
        assert status == 421
        assert b"val" not in body
    assert ask(server, host=f"localhost:{port}")[0] == 200
    mine, line = f"Host: 127.0.0.1:{port}\r\n", f"GET /{server.token}/ HTTP/1.1\r\n"
    for lines in (mine + "Host: evil.example\r\n", "Host: evil.example\r\n" + mine, "X-Forwarded-" + mine):
        assert b" 421 " in raw(server, f"{line}{lines}\r\n".encode())


def test_only_the_two_addresses_answer_and_no_file_does(
    make_run: MakeRun, tmp_path: Path, served: Callable[[Live], LiveServer]
) -> None:
    run = make_run("a")
    (tmp_path / "secret").write_text("SECRET")
    (run / "link").symlink_to(tmp_path / "secret")
    server = served(Live([run]))
    token = server.token
    paths = ["/", "/version", f"/{token}", f"/{token}x/", f"/{token[:-1]}/", "/../secret"]
    below = ["..", "../secret", "%2e%2e/secret", "..%2fsecret", "%2e%2e%2f%2e%2e%2fetc/passwd", "link", "metrics.jsonl"]
    below += ["%00", "version%00", "version/", "version?", "?", "./version", "\\..\\secret", "%u002e", "x" * 60_000]
    for path in [*paths, *below]:
        status, _, body = ask(server, path)
        assert (status, body) == (404, b"there is nothing here\n"), path
    for line in (
        f"GET /{token}/\0 HTTP/1.1",
        f"GET /{token}/../{token}/version HTTP/1.1",
        "GET",
        "\0\0\0",
        "x" * 70_000,
    ):
        answer = raw(server, f"{line}\r\nHost: 127.0.0.1:{server.server_address[1]}\r\n\r\n".encode())
        assert b" 200 " not in answer
        assert b"loss" not in answer
    assert ask(server)[0] == 200  # and it goes on


def test_names_and_numbers_of_others_are_text(make_run: MakeRun, served: Callable[[Live], LiveServer]) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    rows = [{"step": 0, "time_s": 0.0, f"val/{evil}": 1.0, evil: 2.0, "\u202e\0": 1.0}]
    run = make_run(f"{evil.replace('/', '_')}", rows=rows, resolved={"about": {"title": evil}, evil: evil})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "val/huge": 1e999, "val/long": ' + "9" * 4000 + '}\n{"step": 2, "val/ha')
    status, _, page = ask(served(Live([run], title=evil)))
    assert status == 200
    assert page.count(b"<script") == 1
    assert b"<img src=x" not in page


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "samples.jsonl", "pictures", "failed.txt"])
def test_a_link_out_of_a_run_shows_nothing_of_where_it_leads(
    make_run: MakeRun, tmp_path: Path, served: Callable[[Live], LiveServer], name: str
) -> None:
    run = make_run("a")
    outside = tmp_path / "outside"
    outside.write_text(json.dumps({"step": 0, "text": "SECRET", "val/SECRET": 1.0}) + "\n")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    status, _, page = ask(served(Live([run])))
    assert status == 200
    assert b"SECRET" not in page
    assert b"leads out of its run folder" in page


@pytest.mark.parametrize("spoil", ["empty", "pipe", "broken", "gone", "binary"])
def test_a_run_that_cannot_be_read_yet_or_any_more_is_said_on_the_page(
    make_run: MakeRun, tmp_path: Path, served: Callable[[Live], LiveServer], spoil: str
) -> None:
    run, good = make_run("a"), make_run("b")
    path = run / "metrics.jsonl"
    if spoil in ("gone", "pipe"):
        path.unlink()
    if spoil == "pipe":
        os.mkfifo(path)
    if spoil in ("empty", "broken", "binary"):
        path.write_bytes({"empty": b"", "broken": b"{\n{}\n", "binary": os.urandom(2000) + b"\n{}\n"}[spoil])
    alone, both = served(Live([run])), served(Live([run, good]))
    assert b"<h1>Waiting</h1>" in ask(alone)[2]
    assert b"<b>val/loss_nats</b>" in ask(both)[2]
    path.unlink(missing_ok=True)
    path.write_text('{"step": 0, "time_s": 0.0, "val/loss": 1.0}\n')
    assert b"<b>val/loss</b>" in ask(alone)[2]


def test_a_run_that_is_deleted_while_it_is_shown_is_said_and_comes_back(
    make_run: MakeRun, served: Callable[[Live], LiveServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, good = make_run("a"), make_run("b")
    alone, both = served(Live([run])), served(Live([run, good]))
    assert (ask(alone)[0], ask(both)[0]) == (200, 200)
    before = ask(alone, "version")[2]
    run.rename(run.with_name("aside"))
    assert ask(alone, "version")[2] != before
    assert b"<h1>Waiting</h1>" in (gone := ask(alone)[2])
    assert b"does not exist" in gone
    assert b"<h1>b</h1>" in ask(both)[2]
    run.with_name("aside").rename(run)
    assert b"<h1>a</h1>" in ask(alone)[2]

    def deleted(*_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", str(run))

    monkeypatch.setattr(live, "load", deleted)
    monkeypatch.setattr(live, "shown", deleted)  # between looking at the folder and reading it
    (run / "failed.txt").touch()
    assert b"<h1>Waiting</h1>" in ask(alone)[2]


def refused(connection: socket.socket, within_s: float = HANG_S) -> bool:
    """Whether the server ends a connection."""
    connection.settimeout(within_s)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_a_silent_visitor_keeps_nobody_waiting(
    make_run: MakeRun, served: Callable[[Live], LiveServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PATIENCE_S", 0.3)
    server = served(Live([make_run("a")]))
    with socket.create_connection(server.server_address, timeout=HANG_S) as silent:
        assert ask(server)[0] == 200
        assert refused(silent)


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nX: "], ids=["line", "header"])
def test_a_visitor_has_one_time_for_all_that_it_says(
    make_run: MakeRun, served: Callable[[Live], LiveServer], monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    """Also one that never falls silent for long."""
    monkeypatch.setattr(live, "PATIENCE_S", 0.3)
    server = served(Live([make_run("a")]))
    with socket.create_connection(server.server_address, timeout=HANG_S) as slow:
        slow.sendall(begun)

        def is_closed() -> bool:
            try:
                slow.send(b"x")
                return slow.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        slow.settimeout(0.02)
        wait_until(is_closed, "the server to end the connection", every_s=0.0)
    assert ask(server)[0] == 200


def test_of_many_visitors_that_say_nothing_the_oldest_go(
    make_run: MakeRun, served: Callable[[Live], LiveServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MOST_WAITING", 3)
    server = served(Live([make_run("a")]))
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(server.server_address, timeout=HANG_S)) for _ in range(12)]
        assert all(map(refused, idle[:9]))
        # A thread ends a little after its connection.
        wait_until(lambda: threading.active_count() <= before + 4, "the threads to end")
        assert ask(server)[0] == 200  # which is one more, and the newest
        assert refused(idle[9])
        assert not refused(idle[11], 0.05)


def test_a_page_that_is_taken_slowly_arrives_whole(
    make_run: MakeRun, served: Callable[[Live], LiveServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patience is for each part of the answer, not for a page that may have many pictures."""
    page = Live([make_run("a")])
    content = bytes(2**22)
    monkeypatch.setattr(Live, "page", lambda self: content)
    monkeypatch.setattr(live, "PATIENCE_S", 2.0)
    server = served(page)
    with socket.create_connection(server.server_address, timeout=HANG_S) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        slow.sendall(f"GET /{server.token}/ HTTP/1.0\r\nHost: 127.0.0.1:{server.server_address[1]}\r\n\r\n".encode())
        received = 0
        while part := slow.recv(2**18):
            received += len(part)
            time.sleep(0.05)
    assert received > len(content)


def test_a_fault_of_the_page_is_told_and_one_of_a_visitor_is_not(
    make_run: MakeRun,
    served: Callable[[Live], LiveServer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = served(Live([make_run("a")]))
    with socket.create_connection(server.server_address, timeout=HANG_S) as hasty:
        hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends with a reset
        hasty.sendall(b"GET / HT")
    assert ask(server)[0] == 200
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Live, "page", lambda self: 1 / 0)
    assert raw(server, f"GET /{server.token}/ HTTP/1.0\r\nHost: {server.address.split('/')[2]}\r\n\r\n".encode()) == b""
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_port_that_is_taken_or_does_not_exist_is_refused(
    make_run: MakeRun, served: Callable[[Live], LiveServer]
) -> None:
    page = Live([make_run("a")])
    taken = served(page).server_address[1]
    for port in (taken, 70_000, -1):
        with pytest.raises(UserError, match=f"--port {port} cannot be used: .*; leave it out to take a free one"):
            LiveServer(page, port)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only the test moves, in seconds; with it pages rest."""
    now = [100.0]
    monkeypatch.setattr(live, "REST", 4.0)
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    return now


def test_a_page_that_takes_long_leaves_the_processor_to_the_runs(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, now: list[float]
) -> None:
    run = make_run("a")
    page = Live([run])

    def rendered(self: Live) -> str:
        now[0] += 3.0
        return f"page of {now[0]}"

    monkeypatch.setattr(Live, "_rendered", rendered)
    assert page.page() == b"page of 103.0"
    first = page.version()
    (run / "failed.txt").write_text("loss is NaN")
    now[0] += 4.0 * 3.0 - 0.1
    assert (page.version(), page.page()) == (first, b"page of 103.0")  # a browser asks for no page it has
    now[0] += 0.2
    assert page.version() != first
    assert page.page() == f"page of {now[0]}".encode()


def test_looking_at_many_folders_leaves_the_processor_to_the_runs(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, now: list[float]
) -> None:
    run = make_run("a")
    page = Live([run])
    status_of = live.status_of

    def slowly(folder: Path) -> str:
        now[0] += 0.7
        return status_of(folder)

    monkeypatch.setattr(live, "status_of", slowly)
    monkeypatch.setattr(Live, "_rendered", lambda self: f"page of {now[0]}")
    first = page.version()
    (run / "failed.txt").write_text("loss is NaN")
    assert page.page() == b"page of 100.7"  # of that version, although the folders are not looked at again
    now[0] += 4.0 * 0.7 - 0.1
    assert page.version() == first
    now[0] += 0.2
    assert page.version() != first
    assert page.page() == f"page of {now[0]}".encode()
