"""The samples of many tar shards by running number, read one by one in place."""

import copy
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any
from urllib.error import HTTPError

import numpy as np

from lightspan.core.batches import batch_type_of
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import require_regular_file, write_atomic
from lightspan.core.files.attempts import FetchError, retried
from lightspan.core.files.foreign import BYTES, TooMuchError
from lightspan.core.files.places import PathUse
from lightspan.core.files.stores import SCHEME
from lightspan.datamodules.loading.order import Order
from lightspan.datamodules.loading.workers import Damaged
from lightspan.datamodules.shards.cache import ShardCache
from lightspan.datamodules.shards.fetch import local_path, open_shard, read_span
from lightspan.datamodules.shards.index import SUFFIX, ShardIndex, from_json, read_sample, sample_of, scan

MAX_INDEX_BYTES = 2**30  # of one shard's index file


@dataclass(frozen=True)
class OpenShard:
    """A shard whose samples are known. The first `usable` of them can be read; `damage` says what is wrong with the
    others.

    `scanned` is True where the whole shard had to be read to find them.
    """

    index: ShardIndex
    usable: int
    damage: str | None = None
    scanned: bool = False


class ShardOpener:
    """Finds the samples of shards: from the index beside a shard, from an earlier scan, or by a scan.

    Args:
        cache: has copies of remote shards.
        scans: folder that keeps the index of each shard that had to be scanned; None keeps no index.
        max_member_bytes: the largest member that is read.
    """

    def __init__(self, cache: ShardCache, scans: Annotated[Path, PathUse.RUN] | None, max_member_bytes: int) -> None:
        self.cache, self.scans, self.max_member_bytes = cache, scans, max_member_bytes

    def open(self, shard: str) -> OpenShard:
        """Raises: UserError for a damaged index, a compressed shard, or a server that does not answer.

        Damage of the shard itself is in the result.
        """
        text = _index_text(shard)
        if text is not None:
            return _checked(from_json(text, shard))
        try:
            kept = self._kept(shard)
            if kept and kept.is_file():
                return _checked(from_json(kept.read_bytes(), shard, str(kept)))
            index, damage = self._scanned(shard)
        except (OSError, UserError) as error:
            if isinstance(error, UserError) and not _absent(error):
                raise  # the network may be at fault
            return OpenShard(_empty(shard), 0, f"shard {shard} is missing: {error}; its samples cannot be counted")
        if kept and damage is None:
            write_atomic(kept, index.to_json())
        return OpenShard(index, len(index), damage, scanned=True)

    def _kept(self, shard: str) -> Path | None:
        """Where the index of a scan of this very shard is kept; None if there is none.

        A remote shard needs no mark of its content and is not fetched for it: its sha256 is compared when it is.
        Raises: OSError if there is no shard.
        """
        marks: list[str] = []
        if not SCHEME.match(shard):
            stat = local_path(shard).stat()
            marks = [str(stat.st_size), str(stat.st_mtime_ns)]
        return self.scans and self.scans / f"{_digest([shard, *marks])[:32]}{SUFFIX}"

    def _scanned(self, shard: str) -> tuple[ShardIndex, str | None]:
        """Like `scan`, but a remote shard that turns out to be damaged is fetched again, once.

        Raises: UserError for a remote shard of which no copy may be kept.
        """
        if self.cache.reads_parts(shard):
            raise UserError(
                f"shard {shard} has no index, and without a copy it cannot be scanned; write the index with "
                "`lightspan data index`, or set data.init_args.cache_gib above 0"
            )
        index, damage = scan(self.cache.local(shard), shard, self.max_member_bytes)
        copy = self.cache.renewed(shard) if damage else None
        if copy is not None:
            index, damage = scan(copy, shard, self.max_member_bytes)
            damage = damage and f"{damage}; it was fetched twice, and the copy is {copy}"
        return index, damage


def _index_text(shard: str) -> bytes | None:
    """The index file beside a shard; None if there is none."""
    name = shard + SUFFIX
    if not SCHEME.match(shard) and not local_path(name).exists():
        return None

    def fetch() -> bytes:
        with open_shard(name) as stream:
            try:
                return stream.read(MAX_INDEX_BYTES + 1)
            except (OSError, HTTPException) as error:
                raise UserError(f"{name} cannot be read: {error}") from error

    try:
        text = retried(fetch)
    except UserError as error:
        if _absent(error):
            return None
        raise
    if len(text) > MAX_INDEX_BYTES:
        raise UserError(f"{name} is larger than {MAX_INDEX_BYTES:,} bytes; write smaller shards")
    return text


def _absent(error: UserError) -> bool:
    """Whether a server said that there is no such file; it says 403 if listing its files is not allowed."""
    cause = error.__cause__
    return isinstance(cause, FileNotFoundError) or (isinstance(cause, HTTPError) and cause.code in (403, 404, 410))


def _checked(index: ShardIndex) -> OpenShard:
    """Compares a local shard with its index. A remote one is compared when it is fetched."""
    if SCHEME.match(index.shard):
        return OpenShard(index, len(index))
    try:
        path = local_path(index.shard)
        size = path.stat().st_size
        require_regular_file(path, "shard")
    except OSError as error:
        return OpenShard(index, 0, f"shard {index.shard} is missing: {error}; it contains {len(index)} samples")
    if size == index.size:
        return OpenShard(index, len(index))
    usable = int(np.searchsorted(index.ends, size, side="right")) if size < index.size else 0
    if usable == len(index):
        return OpenShard(index, usable)  # only the end mark is lost
    what = f"is cut short: {index.where(usable)} is the first of" if usable else "does not match its index:"
    return OpenShard(
        index,
        usable,
        f"shard {index.shard} has {size:,} bytes, but its index says {index.size:,}; it {what} "
        f"{len(index) - usable} samples that cannot be read",
    )


def _empty(shard: str) -> ShardIndex:
    return ShardIndex(shard, 0, "", np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint32))


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


class ShardSamples:
    """Samples of shards, numbered consecutively over the usable ones of each shard. Nothing stays open between two
    samples.

    Args:
        shards: as `ShardOpener` opened them.
        decode: (members of a sample, seed) -> values.
        cache: has copies of remote shards.
        max_member_bytes: the largest member that is read.
        skip_damaged: True raises `Damaged` for a sample that cannot be read or decoded, so that the loader replaces it.
    """

    def __init__(
        self,
        shards: list[OpenShard],
        decode: Callable[[dict[str, Any], int], dict[str, Any]],
        cache: ShardCache,
        max_member_bytes: int,
        skip_damaged: bool,
    ) -> None:
        self.indices = [shard.index for shard in shards]
        self.sizes = tuple(shard.usable for shard in shards)
        self.damage = tuple(shard.damage for shard in shards if shard.damage is not None)
        scanned = sum(shard.scanned for shard in shards)
        self.remarks = tuple(f"shard {index.shard}: {remark}" for index in self.indices for remark in index.remarks)
        if scanned:
            self.remarks = (
                f"{scanned} shards have no index, so they were read completely; `lightspan data index FOLDER` "
                "on their folder writes one beside each",
                *self.remarks,
            )
        self.firsts = np.concatenate([[0], np.cumsum(self.sizes)])  # number of each shard's first sample, then N
        self.decode, self.cache = decode, cache
        self.max_member_bytes, self.skip_damaged = max_member_bytes, skip_damaged

    @property
    def batch_type(self) -> type | None:
        return batch_type_of(self.decode)

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def decoded_by(self, decode: Callable[[dict[str, Any], int], dict[str, Any]]) -> "ShardSamples":
        """The same samples, decoded in another way."""
        other = copy.copy(self)
        other.decode = decode
        return other

    def order(self, window: int) -> Order:
        """The order of training: shards in windows, every sample once in each epoch. See `Order`."""
        content = _digest(f"{index.sha256} {size}" for index, size in zip(self.indices, self.sizes, strict=True))
        return Order(self.sizes, window, True, content[:32], self.skip_damaged, self.damage)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        """The decoded fields and `index`. Raises: UserError, or `Damaged` if damaged samples are skipped; FetchError if
        the network is at fault, which is not skipped.
        """
        block = int(np.searchsorted(self.firsts, index, side="right")) - 1
        number, shard = index - int(self.firsts[block]), self.indices[block]
        try:
            values = self.decode(self._members(shard, number), seed)
        except FetchError:
            raise
        except UserError as error:
            where = shard.where(number)
            message = str(error) if where in str(error) else f"{where}: {error}"
            if self.skip_damaged:
                raise Damaged(message) from error
            raise UserError(f"{message}; or leave it out with data.init_args.skip_damaged=true") from error
        return {**values, "index": index}

    def _members(self, shard: ShardIndex, number: int) -> dict[str, Any]:
        if self.cache.reads_parts(shard.shard):
            return self._part(shard, number)
        path = self.cache.local(shard.shard, shard.size, shard.sha256)
        try:
            return read_sample(shard, number, path, self.max_member_bytes)
        except UserError:
            copy = self.cache.renewed(shard.shard, shard.sha256)
            if copy is None:
                raise
            return read_sample(shard, number, copy, self.max_member_bytes)

    def _part(self, shard: ShardIndex, number: int) -> dict[str, Any]:
        """A sample whose bytes alone are fetched; once more if they are not what the index says."""
        start, end = int(shard.starts[number]), int(shard.ends[number])
        try:
            BYTES.require(end - start)
        except TooMuchError as error:
            raise UserError(f"{shard.where(number)} cannot be read: {error}") from error
        fetch = partial(read_span, shard.shard, start, end)
        try:
            return sample_of(shard, number, retried(fetch), self.max_member_bytes)
        except FetchError:
            raise
        except UserError:
            return sample_of(shard, number, retried(fetch), self.max_member_bytes)
