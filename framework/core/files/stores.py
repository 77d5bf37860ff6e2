"""Bytes of objects in object stores, through fsspec: whole or in ranges, within time limits, and never more than that.

Keys come from where the store's own tools look for them: environment, ~/.aws, the role of the machine. An address has
none, and nothing here prints one.
"""

import errno
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from lightspan.core.errors import UserError, first_lines, install_extra

# A closed list: fsspec knows file systems that run programs, follow links into others, or read without encryption.
STORES = ("s3", "gs", "abfs")
SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+):")  # a single letter is a drive
BLOCK_BYTES = 2**24  # asked for at a time
# A request for a range may take this long, and its bytes at this pace besides; a store that falls silent ends at once.
TIMEOUT_S, BYTES_PER_S = 60.0, 2**20 / 60
# What another attempt would not change. Anything else that a store or the network says may pass.
_LASTING = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG)
# What stores call the content of an object: S3, Google, Azure.
_CONTENT_NAMES = ("ETag", "etag", "generation")
_process = os.getpid()  # in which fsspec waits for answers
T = TypeVar("T")


def in_store(address: str) -> bool:
    """Whether it is the address of an object of a store."""
    scheme = SCHEME.match(address)
    return scheme is not None and scheme[1].lower() in STORES


def require_object(address: str, setting: str) -> None:
    """Raises: UserError unless `address` is SCHEME://BUCKET/NAME, without keys in it and without links to others."""
    try:
        parts = urlsplit(address)
        named = bool(parts.netloc and parts.path.strip("/"))
        # No bucket has a colon in its name, and a key may have a slash; abfs://CONTAINER@ACCOUNT has an at sign.
        keys = ":" in parts.netloc or ("@" in parts.netloc and parts.scheme != "abfs")
    except ValueError:
        keys, named = False, False
    if keys:
        raise UserError(
            f"{setting} names a {parts.scheme} address with a key in it, which would be written down with the run; "
            "give keys in the environment, as the tools of the store read them"
        )
    if not named or "::" in address:
        raise UserError(
            f"{setting}: {address} is not the address of an object; write {address.partition(':')[0]}://BUCKET/NAME"
        )


def read_range(address: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of an object, in one request.

    Raises: FileNotFoundError, PermissionError, ConnectionError (which may pass) or another OSError.
    """
    if start == end:
        return b""
    limit_s = TIMEOUT_S + (end - start) / BYTES_PER_S
    content: bytes = _asked(address, lambda store: store.cat_file(address, start=start, end=end, timeout=limit_s))
    if len(content) != end - start:
        raise OSError(
            f"it ends at byte {start + len(content):,}, before byte {end:,}"
        )  # libraries tell what was cut off
    return content


class ObjectState(NamedTuple):
    """Bytes of an object, and what its store calls this content of it; empty where it has no word for that."""

    size: int
    content: str


def state_of(address: str) -> ObjectState:
    """Raises: OSError as `read_range`."""
    found = _asked(address, lambda store: store.info(address, timeout=TIMEOUT_S))
    if found["type"] != "file":
        raise FileNotFoundError("there is a folder of this name, and no object")
    size = found["size"]
    if not isinstance(size, int) or size < 0:
        raise OSError(f"the store says that it has {size} bytes")
    return ObjectState(size, next((str(found[name]) for name in _CONTENT_NAMES if found.get(name)), ""))


def write(address: str, content: bytes) -> None:
    """An object, whole or not at all. Raises: OSError as `read_range`."""
    limit_s = TIMEOUT_S + len(content) / BYTES_PER_S
    _asked(address, lambda store: store.pipe_file(address, content, timeout=limit_s))


def put_file(address: str, path: Path) -> None:
    """A file of this machine as an object, whole or not at all. Raises: OSError as `read_range`."""
    limit_s = TIMEOUT_S + path.stat().st_size / BYTES_PER_S
    _asked(address, lambda store: store.put_file(str(path), address, timeout=limit_s))


def remove(address: str) -> None:
    """Of an object, which need not be there. Raises: OSError as `read_range`."""
    _asked(address, lambda store: store.rm_file(address, timeout=TIMEOUT_S))


def names_in(address: str) -> list[str]:
    """Names of the objects directly below an address, sorted. Raises: OSError as `read_range`."""
    bucket, slash, folder = address.partition("://")[2].rstrip("/").partition("/")
    place = f"{bucket.partition('@')[0]}{slash}{folder}"

    def ask(store: Any) -> list[str]:
        files = [item["name"].rpartition("/") for item in store.ls(address, detail=True) if item["type"] == "file"]
        return [name for parent, _, name in files if parent == place]  # an object is listed at its own address

    return sorted(_asked(address, ask))


class ObjectStream(io.RawIOBase):
    """An object from its start, in one request after another.

    Attributes:
        length: bytes that are still to come, as of an answer of http.

    Raises: OSError as `read_range`; ConnectionError, at its end, for one that became another meanwhile.
    """

    def __init__(self, address: str) -> None:
        self._before = state_of(address)
        self.address, self.length, self._at, self._block = address, self._before.size, 0, memoryview(b"")

    def read1(self, size: int) -> bytes:
        """At most `size` bytes, as many as have arrived; none at the end."""
        if not self._block and self.length:
            end = self._at + min(BLOCK_BYTES, self.length)
            self._block, self._at = memoryview(read_range(self.address, self._at, end)), end
            if end == self._before.size and state_of(self.address) != self._before:
                raise ConnectionError("it was replaced while it was read")
        part, self._block = self._block[:size], self._block[size:]
        self.length -= len(part)
        return bytes(part)

    def read(self, size: int = -1) -> bytes:
        parts, left = [], self.length if size < 0 else min(size, self.length)
        while left:
            parts.append(self.read1(left))
            left -= len(parts[-1])
        return b"".join(parts)


def _asked(address: str, ask: Callable[[Any], T]) -> T:
    """What `ask` gets from the store of an address. Whatever goes wrong is an OSError of the kinds of `read_range`.

    A library of each store raises errors of its own, many of which are no OSErrors.
    """
    try:
        return ask(_store(urlsplit(address).scheme.lower()))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the store has no such object ({_said(error)})") from error
    except PermissionError as error:
        raise PermissionError(
            f"the store refuses it ({_said(error)}): keys may be missing, wrong, expired, or not allowed to do "
            "this; where they may not list the bucket, the store says this also of names that are not there"
        ) from error
    except TimeoutError as error:
        raise TimeoutError("the store is silent, or too slow to wait for") from error
    except OSError as error:
        if error.errno in _LASTING:
            raise
        raise ConnectionError(_said(error)) from error
    except UserError:
        raise
    except Exception as error:
        raise ConnectionError(_said(error)) from error


def _said(error: Exception) -> str:
    """What the store said, without the number that its library has given that."""
    words = error.strerror if isinstance(error, OSError) else None
    return first_lines(Exception(words) if words else error)


def _store(scheme: str) -> Any:
    """The file system of a scheme. It is asked for anew each time: fsspec keeps one for each process and thread, and
    one from before a fork cannot be used after it.
    """
    import fsspec.asyn

    global _process
    if _process != os.getpid():
        # A fork has its parent's loop without the thread that runs it; not every version of fsspec drops it by itself.
        fsspec.asyn.reset_lock()
        _process = os.getpid()
    # Attempts are counted and told in one place, `retried`; these settings leave the library one each.
    config = {"connect_timeout": TIMEOUT_S, "read_timeout": TIMEOUT_S, "retries": {"total_max_attempts": 1}}
    settings = {"s3": {"config_kwargs": config}}
    try:
        store = fsspec.filesystem(scheme, use_listings_cache=False, **settings.get(scheme, {}))
    except ImportError as error:
        raise UserError(
            f"{scheme} addresses are read by a package that is missing ({first_lines(error)}): "
            f"{install_extra('cloud')} has that of s3"
        ) from error
    store.retries = 1
    return store
