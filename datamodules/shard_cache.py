"""Shards on this machine: local ones where they are, those behind https as copies that all processes share."""

import contextlib
import hashlib
import os
import shutil
import ssl
import time
from collections.abc import Iterator
from functools import partial
from http.client import HTTPException, IncompleteRead
from pathlib import Path

from lightspan.datamodules.tars import SCHEME, open_shard, retried
from lightspan.errors import UserError
from lightspan.files import atomic_path

IN_USE_S = 60
COPY = "[0-9a-f]" * 32 + ".tar"  # the folder may hold other people's tars


class ShardCache:
    """Copies of remote shards, each fetched whole, once for all ranks and workers of a machine.

    When the copies outgrow the limit, those used longest ago are deleted; whoever needs one again fetches it again.
    Copies used in the last minute stay, since another process may be about to open them.

    Args:
        folder: of the copies; None takes $XDG_CACHE_HOME/lightspan/shards, usually below ~/.cache.
        limit_bytes: of all copies together.
    """

    def __init__(self, folder: str | None, limit_bytes: int) -> None:
        default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lightspan" / "shards"
        self.folder = Path(folder or default).expanduser()
        self.limit_bytes = limit_bytes

    def local(self, shard: str, size: int | None = None) -> Path:
        """Where the bytes of `shard` lie. A copy of another size than `size` is fetched anew.

        Raises: UserError where a remote shard cannot be fetched, or comes with another size.
        """
        if not SCHEME.match(shard):
            return Path(shard).expanduser()
        copy = self.folder / f"{hashlib.sha256(shard.encode()).hexdigest()[:32]}.tar"
        if not _is_copy(copy, size):
            with _locked(copy.with_suffix(".lock")):
                if not _is_copy(copy, size):  # another process may have been first
                    retried(partial(_fetch, shard, copy, size))
                    self._evict()
        with contextlib.suppress(OSError):
            os.utime(copy)  # its last use
        return copy

    def _evict(self) -> None:
        copies = {copy: copy.stat() for copy in self.folder.glob(COPY)}
        total = sum(stat.st_size for stat in copies.values())
        for copy in sorted(copies, key=lambda copy: copies[copy].st_mtime_ns):
            if total <= self.limit_bytes or copies[copy].st_mtime > time.time() - IN_USE_S:
                return
            copy.unlink(missing_ok=True)
            total -= copies[copy].st_size


def _is_copy(path: Path, size: int | None) -> bool:
    return path.is_file() and (size is None or path.stat().st_size == size)


def _fetch(shard: str, copy: Path, size: int | None) -> None:
    with open_shard(shard) as stream, atomic_path(copy) as temporary:
        promised = getattr(stream, "length", None)  # what the server announces
        expected = promised if size is None else size
        try:
            with temporary.open("wb") as file:
                shutil.copyfileobj(stream, file, 2**20)
        except (HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            raise UserError(f"shard {shard} broke off while it was fetched: {error}") from error
        found = temporary.stat().st_size
        if promised is not None and found < promised:
            short = IncompleteRead(b"", promised - found)
            raise UserError(f"shard {shard} broke off after {found:,} of {promised:,} bytes") from short
        if expected is not None and found != expected:
            raise UserError(f"shard {shard} came with {found:,} bytes instead of {expected:,}; fetch or write it again")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process of this machine in at a time."""
    import fcntl  # not on Windows, where only remote shards would need it

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
