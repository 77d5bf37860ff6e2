"""Shards on this machine: local ones where they are, remote ones as copies that all processes share."""

import contextlib
import hashlib
import os
import time
from functools import partial
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import atomic_path, explained_os_errors, temporary_path
from lightspan.core.files.attempts import retried
from lightspan.core.files.caches import CacheFolder
from lightspan.core.files.places import CachePath
from lightspan.core.files.stores import SCHEME
from lightspan.datamodules.shards.fetch import local_path, open_shard
from lightspan.datamodules.shards.index import sha256_of

COPY = "[0-9a-f]" * 32 + ".tar"
# How long after its last use a file counts as in use: copies, and downloads, which grow all the time.
IN_USE_S = {COPY: 60, temporary_path(Path(COPY), "*").name: 3600}
ROOM_BYTES = 2**26  # freed at a time for a shard of unknown size
SETTING = "data.init_args.cache_dir"


class ShardCache:
    """Copies of remote shards, each downloaded completely, once for all ranks and workers of a machine.

    A copy gets its name once complete, and has the size and sha256 of its index, if there is one. Before and while
    a shard is fetched, the least recently used copies make room for it; they are fetched again when needed. Copies
    used in the last minute stay, since another process may be about to open them. In a dry run a copy that is there is
    read, and any other is fetched into a temporary folder.

    Args:
        folder: folder for the copies; None means $XDG_CACHE_HOME/lightspan/shards, usually below ~/.cache.
        limit_bytes: of all copies together; no single shard may be larger. 0 keeps none: `reads_parts`.
    """

    def __init__(self, folder: CachePath | None, limit_bytes: int) -> None:
        self.cache, self.limit_bytes = CacheFolder(folder, "shards", SETTING), limit_bytes

    def reads_parts(self, shard: str) -> bool:
        """Whether samples are read from where the shard is, one by one, as there is no room for a copy."""
        return self.limit_bytes == 0 and SCHEME.match(shard) is not None

    def local(self, shard: str, size: int | None = None, sha256: str | None = None) -> Path:
        """Where the bytes of `shard` are. A copy of another size than `size` is fetched again.

        Raises: UserError if a remote shard cannot be fetched, or has another size or sha256.
        """
        if not SCHEME.match(shard):
            return local_path(shard)
        held = self.cache.held(_name(shard))
        if held is not None and _is_copy(held, size):
            return held
        copy = self.cache.part() / _name(shard)
        if not _is_copy(copy, size):
            with explained_os_errors(copy, setting=SETTING), FileLock(copy.with_suffix(".lock")):
                if not _is_copy(copy, size):  # another process may have been first
                    retried(partial(self._fetch, shard, copy, size, sha256))
        with contextlib.suppress(OSError):  # the time of its last use; the time of writing stays
            os.utime(copy, ns=(time.time_ns(), copy.stat().st_mtime_ns))
        return copy

    def renewed(self, shard: str, sha256: str | None = None) -> Path | None:
        """A remote shard fetched again, for a copy that turned out to be bad.

        None if that cannot help: the shard is local, or its copy has the sha256 that it should have.
        Raises: UserError as `local` does.
        """
        if not SCHEME.match(shard):
            return None
        copy = self.cache.part() / _name(shard)
        with explained_os_errors(copy, setting=SETTING), FileLock(copy.with_suffix(".lock")):
            if sha256 is not None and copy.is_file() and sha256_of(copy) == sha256:
                return None  # another process may have been first
            retried(partial(self._fetch, shard, copy, None, sha256))
        return copy

    def _fetch(self, shard: str, copy: Path, size: int | None, sha256: str | None) -> None:
        for leftover in copy.parent.glob(temporary_path(copy, "*").name):
            leftover.unlink(missing_ok=True)  # from a killed process: this one holds the lock
        with open_shard(shard) as stream, atomic_path(copy, setting=SETTING) as temporary:
            promised: int | None = getattr(stream, "length", None)  # what the server announces
            expected = promised if size is None else size
            if promised is not None and promised != expected:
                raise UserError(_other_size(shard, f"{promised:,}", expected))
            if expected is not None and expected > self.limit_bytes:
                raise UserError(self._too_large(shard, f"has {expected:,} bytes"))
            room, found, digest = expected or 0, 0, hashlib.sha256()
            self._make_room(copy.parent, room)
            with temporary.open("wb") as file:
                while block := _next_block(stream, shard):
                    found += len(block)
                    if expected is not None and found > expected:
                        raise UserError(_other_size(shard, f"more than {expected:,}", expected))
                    if found > self.limit_bytes:
                        raise UserError(self._too_large(shard, "does not state its size and does not end"))
                    if found > room:
                        self._make_room(copy.parent, ROOM_BYTES)
                        room = found + ROOM_BYTES
                    file.write(block)
                    digest.update(block)
            if promised is not None and found < promised:
                short = IncompleteRead(b"", promised - found)
                raise UserError(f"shard {shard} ended after {found:,} of {promised:,} bytes") from short
            if expected is not None and found != expected:
                raise UserError(_other_size(shard, f"{found:,}", expected))
            if sha256 is not None and digest.hexdigest() != sha256:
                raise UserError(
                    f"shard {shard} has sha256 {digest.hexdigest()}, but its index says {sha256}; write shard "
                    "and index again, or start a new run if the index was kept by an earlier run"
                )

    def _make_room(self, part: Path, incoming: int) -> None:
        files, in_use_s = {}, {path: time_s for name, time_s in IN_USE_S.items() for path in part.glob(name)}
        for path in in_use_s:
            with contextlib.suppress(OSError):  # another process may have deleted it
                files[path] = path.stat()
        total = incoming + sum(stat.st_size for stat in files.values())
        last_used = {path: max(stat.st_atime, stat.st_mtime) for path, stat in files.items()}
        for path in sorted(files, key=lambda path: last_used[path]):
            if total <= self.limit_bytes:
                return
            if last_used[path] < time.time() - in_use_s[path]:
                path.unlink(missing_ok=True)
                total -= files[path].st_size

    def _too_large(self, shard: str, what: str) -> str:
        return (
            f"shard {shard} {what}, above the limit of {self.limit_bytes:,} bytes for all copies together; raise "
            "data.init_args.cache_gib if you trust the server"
        )


def _name(shard: str) -> str:
    return f"{hashlib.sha256(shard.encode()).hexdigest()[:32]}.tar"


def _is_copy(path: Path, size: int | None) -> bool:
    return path.is_file() and (size is None or path.stat().st_size == size)


def _next_block(stream: BinaryIO, shard: str) -> bytes:
    try:
        block: bytes = stream.read1(2**20)  # type: ignore[attr-defined]  # what has arrived so far
    except (OSError, HTTPException) as error:
        raise UserError(f"shard {shard} could not be downloaded completely: {error}") from error
    return block


def _other_size(shard: str, found: str, expected: int | None) -> str:
    return f"shard {shard} has {found} bytes instead of {expected:,}; fetch or write it again"
