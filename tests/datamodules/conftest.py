"""An https server on this machine, with a certificate that this process trusts."""

import re
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from store_fixtures import gate, s3_server  # noqa: F401

from lightspan.core.files import attempts


@dataclass
class HttpsServer:
    """address: https://HOST:PORT. files: {path: content}, to be filled by a test. asked: the paths that were read.
    stumbles: {path: what to answer first, each once}: a status, "cut" for half of the content, or the lines of a whole
    answer, with `pause_s` between them. ranges: whether parts of a file can be asked for.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    stumbles: dict[str, list[int | str | list[bytes]]] = field(default_factory=dict)
    pause_s: float = 0
    ranges: bool = True


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "PAUSES_S", (0.01, 0.02, 0.03))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate, its key) of 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the server's certificate")
    folder = tmp_path_factory.mktemp("certificate")
    key, certificate = folder / "key.pem", folder / "cert.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        "-addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


@pytest.fixture
def https_server(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpsServer]:
    served = HttpsServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(self.path)
            stumble = served.stumbles.get(self.path)
            now = stumble.pop(0) if stumble else None
            if isinstance(now, int):
                self.send_error(now)
            elif isinstance(now, list):
                self.close_connection = True
                for line in now:
                    self.wfile.write(line)
                    time.sleep(served.pause_s)
            elif self.path == "/downgrade.tar":
                self.send_response(302)
                self.send_header("Location", "http://127.0.0.1:9/a.tar")
                self.end_headers()
            elif self.path in served.files:
                content = served.files[self.path]
                span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if served.ranges else None
                if span:
                    content = content[int(span[1]) : int(span[2]) + 1]
                self.send_response(206 if span else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if now == "cut" else content)
            else:
                self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    class Server(HTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # the other side has given up, as it should

    server = Server(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served.address = f"https://127.0.0.1:{server.server_port}"
    yield served
    server.shutdown()
    thread.join()
    server.server_close()
