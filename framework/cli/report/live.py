"""A report that follows its runs: served on the loopback interface alone, read only, and made anew when files changed.

The server knows two addresses, the page and a number that changes with it, and opens no file that a request names. Both
addresses contain a token that only the one who started it has been told, since every user of a machine shares its
loopback interface. A request must name this machine as its host: a page from elsewhere whose name was bound anew to
127.0.0.1 does not. Connections that have not said what they want are few and short-lived, so that nobody who opens
many of them, or speaks slowly, keeps others waiting.
"""

import contextlib
import hashlib
import io
import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lightspan.cli.report.markup import escape
from lightspan.cli.report.page import Script, document
from lightspan.cli.report.shown import shown
from lightspan.cli.report.sweeps import load
from lightspan.cli.runs.direction import Mode
from lightspan.cli.runs.status import status_of
from lightspan.core.errors import UserError
from lightspan.core.files.runs import METRICS, PICTURES, RESOLVED, SAMPLES, SUMMARY, SWEEP

HOST = "127.0.0.1"
PATIENCE_S = 10.0
"""Seconds that a connection may take to say what it wants, and then to take each `_PART` of the answer."""
MOST_WAITING = 64
"""Connections that have not yet said what they want; the oldest one is closed when there are more."""
_PART = 2**16  # bytes
REST = 4.0
"""How many times as long as a look at the files, or the rendering of a page, took the next one waits."""
_WATCHED = (METRICS, SUMMARY, RESOLVED, SAMPLES, PICTURES, SWEEP)
_SCRIPT = """
const every = 2000, note = document.createElement("p");
let shown = null;
async function get(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(answer.status);  // another server has this port now
  return answer.text();
}
async function look() {
  try {
    const version = await get("version");
    if (shown !== null && version !== shown) {
      const page = new DOMParser().parseFromString(await get(""), "text/html");
      const open = new Set([...document.querySelectorAll("details[open] > summary")].map(one => one.textContent));
      document.querySelector("main").replaceWith(page.querySelector("main"));
      document.title = page.title;
      for (const one of document.querySelectorAll("details > summary"))
        one.parentElement.open = open.has(one.textContent);
    }
    shown = version;
    note.remove();
  } catch {
    note.className = "note ended";
    note.textContent = "lightspan watch has ended: this page shows what it saw last.";
    document.querySelector("main").prepend(note);
  }
  setTimeout(look, every);
}
look();
"""


@dataclass
class Live:
    """The report of some folders as it stands when it is asked for.

    Args:
        folders: of runs and sweeps; they need not have figures yet.
        title, folds, metric, mode: see `shown`.
    """

    folders: Sequence[Path]
    title: str | None = None
    folds: bool = True
    metric: str | None = None
    mode: Mode | None = None
    _script: Script = field(default_factory=lambda: Script(secrets.token_urlsafe(16), _SCRIPT), init=False)
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False)
    _look: threading.Lock = field(default_factory=threading.Lock, init=False)
    _version: str = field(default="", init=False)
    _rendered_version: str = field(default="", init=False)
    _page: bytes = field(default=b"", init=False)
    _rests_until_s: float = field(default=-math.inf, init=False)

    def version(self) -> str:
        """A text that changes whenever a file of the runs does, or a run begins or ends; after a look at the files, or
        a page, that took long, not before it has rested: the runs may need this machine's processor more.
        """
        with self._look:
            if (began_s := time.monotonic()) >= self._rests_until_s:
                self._version = self._stamps()
                self._rest(began_s)
            return self._version

    def _rest(self, began_s: float) -> None:
        ended_s = time.monotonic()
        self._rests_until_s = max(self._rests_until_s, ended_s + REST * (ended_s - began_s))

    def _stamps(self) -> str:
        digest = hashlib.sha256()
        for folder in self.folders:
            for place in _run_folders(folder):
                digest.update(
                    repr((str(place), status_of(place), [_stamp(place / name) for name in _WATCHED])).encode()
                )
        return digest.hexdigest()

    def page(self) -> bytes:
        """The page, rendered anew if the version has changed."""
        with self._turn:
            version = self.version()
            if version != self._rendered_version:
                began_s = time.monotonic()
                self._page, self._rendered_version = self._rendered().encode("utf-8", "replace"), version
                self._rest(began_s)
            return self._page

    @property
    def policy(self) -> str:
        """The content security policy of the page."""
        return self._script.policy

    def _rendered(self) -> str:
        try:
            return self._report(self.folders)
        except (UserError, OSError) as error:  # the latter of a run that is deleted while it is read
            said = error
        ready = [folder for folder in self.folders if _loads(folder)]
        with contextlib.suppress(UserError, OSError):
            if ready:
                return self._report(ready)
        title = self.title or "Waiting"
        statuses = ", ".join(f"{folder}: {status_of(folder)}" for folder in self.folders)
        body = f'<h1>{escape(title)}</h1><p class="lead">{escape(str(said))}</p><p class="note">{escape(statuses)}</p>'
        return document(title, body, "lightspan watch", self._script)

    def _report(self, folders: Sequence[Path]) -> str:
        return shown(folders, self.title, self.folds, self.metric, self.mode).page(self._script)


def _loads(folder: Path) -> bool:
    try:
        load([folder])
    except (UserError, OSError):
        return False
    return True


def _run_folders(folder: Path) -> Iterator[Path]:
    """The folder itself, and the run folders in it if it is a sweep's."""
    yield folder
    if (folder / SWEEP).is_file():
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            yield from sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size


class LiveServer(ThreadingHTTPServer):
    """Serves a `Live` page on 127.0.0.1 until it is closed.

    Args:
        live: the page.
        port: in [0, 65535]; 0 takes a free one.
    Raises: UserError for a port that cannot be had.
    """

    daemon_threads = True
    request_queue_size = 2 * MOST_WAITING  # a full queue makes a visitor wait for a second

    def __init__(self, live: Live, port: int = 0) -> None:
        self.live, self.token = live, secrets.token_urlsafe(16)
        self._waiting: dict[socket.socket, None] = {}  # oldest first
        self._guard = threading.Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--port {port} cannot be used: {reason}; leave it out to take a free one") from error

    @property
    def address(self) -> str:
        """What to type into a browser on this machine."""
        return f"http://{HOST}:{self.server_address[1]}/{self.token}/"

    def knows(self, hosts: Sequence[str]) -> bool:
        """Whether a request's one Host header names this server as somebody on this machine does."""
        port = self.server_address[1]
        return len(hosts) == 1 and hosts[0] in (f"{HOST}:{port}", f"localhost:{port}")

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._guard:
            self._waiting[request] = None
            oldest = next(iter(self._waiting))
            if late := len(self._waiting) > MOST_WAITING:
                del self._waiting[oldest]
        if late:
            with contextlib.suppress(OSError):  # it has gone by itself
                oldest.shutdown(socket.SHUT_RDWR)  # its thread reads the end, and closes it
        super().process_request(request, client_address)

    def heard(self, request: Any) -> None:
        """Called when a connection has said what it wants, or has ended."""
        with self._guard:
            self._waiting.pop(request, None)

    def shutdown_request(self, request: Any) -> None:
        self.heard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Of a browser that closes its connection early nothing is said; the server goes on in any case."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Request(io.RawIOBase):
    """What a connection says within its time, however slowly it speaks."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._until_s = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._connection.settimeout(left_s)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD for the two addresses; everything else is refused without looking at it."""

    server: LiveServer
    server_version, sys_version = "lightspan", ""

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Request(self.connection, PATIENCE_S))

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        self.server.heard(self.connection)
        self.connection.settimeout(PATIENCE_S)
        status, kind, content = self._found()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", f"{self.server.live.policy}; frame-ancestors 'none'; base-uri 'none'"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(content) if with_body else 0, _PART):
            self.wfile.write(content[start : start + _PART])

    def _found(self) -> tuple[HTTPStatus, str, bytes]:
        if not self.server.knows(self.headers.get_all("Host", [])):
            return HTTPStatus.MISDIRECTED_REQUEST, "text/plain", b"open the address that lightspan watch printed\n"
        home = f"/{self.server.token}/"
        if secrets.compare_digest(self.path.encode("utf-8", "replace"), home.encode()):
            return HTTPStatus.OK, "text/html", self.server.live.page()
        if secrets.compare_digest(self.path.encode("utf-8", "replace"), f"{home}version".encode()):
            return HTTPStatus.OK, "text/plain", self.server.live.version().encode()
        return HTTPStatus.NOT_FOUND, "text/plain", b"there is nothing here\n"

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """As the base class, but without repeating what was asked for."""
        super().send_error(code, None if code != HTTPStatus.NOT_IMPLEMENTED else "only GET and HEAD are answered")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests are written by others, and a terminal obeys what is written to it."""
