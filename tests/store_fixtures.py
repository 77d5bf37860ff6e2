"""An object store for tests: moto's server of S3 in this process, behind a gate that stumbles as a test tells it."""

import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

KEY, SECRET = "AKIAPLANTEDPLANTED00", "planted/secret/access/key/0123456789abcd"


@dataclass
class Gate:
    """address: of the server. asked: (method, path, range) of each request. stumbles: {path: what to answer first, each
    once}: a status, (status, code of S3), "cut" for half of the content, "flip" for a wrong byte in its midst, "drip"
    for one byte after another, "silent", or "lies" for twice the length in the header; None is answered as it is.
    """

    address: str = ""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    stumbles: dict[str, list[Any]] = field(default_factory=dict)
    released: threading.Event = field(default_factory=threading.Event)

    def through(self, application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            self.asked.append((environ["REQUEST_METHOD"], path, environ.get("HTTP_RANGE", "")))
            now = self.stumbles[path].pop(0) if self.stumbles.get(path) else None
            if isinstance(now, int | tuple):
                status, code = now if isinstance(now, tuple) else (now, "")
                page = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode() if code else b""
                start_response(f"{status} Stumble", [("Content-Length", str(len(page)))])
                return [] if environ["REQUEST_METHOD"] == "HEAD" else [page]  # bytes behind a header end the connection
            if now == "silent":
                self.released.wait(20)
            if now == "lies":

                def begin(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
                    long = [(n, str(2 * int(v)) if n.lower() == "content-length" else v) for n, v in headers]
                    return start_response(status, long, *rest)

                return application(environ, begin)
            content = b"".join(application(environ, start_response))
            half = len(content) // 2
            if now == "drip":
                return (time.sleep(0.05) or content[at : at + 1] for at in range(40))  # type: ignore[func-returns-value]
            if now == "flip":
                return [content[:half], bytes([content[half] ^ 0xFF]), content[half + 1 :]]
            return [content[:half] if now == "cut" else content]

        return answer


@pytest.fixture(scope="module")
def s3_server() -> Iterator[Gate]:
    s3fs = pytest.importorskip("s3fs", reason="the extra `cloud` is not installed")
    pytest.importorskip("moto.server", reason="the extra `peers` is not installed")
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *arguments: Any, **more: Any) -> None:
            pass

    gate = Gate()
    application = gate.through(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    gate.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    s3fs.S3FileSystem.clear_instance_cache()  # each keeps the address and the keys with which it began
    yield gate
    s3fs.S3FileSystem.clear_instance_cache()
    gate.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def gate(s3_server: Gate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gate:
    """An empty bucket `lab`, and the keys to it in the environment."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": s3_server.address,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    s3_server.stumbles.clear()
    for method, path in (("POST", "/moto-api/reset"), ("PUT", "/lab")):
        urllib.request.urlopen(urllib.request.Request(s3_server.address + path, method=method, data=b"")).close()
    s3_server.asked.clear()
    return s3_server


def put(path: str, content: bytes) -> str:
    """The address of a new object of the bucket."""
    import s3fs

    s3fs.S3FileSystem().pipe_file(f"lab/{path}", content)
    return f"s3://lab/{path}"
