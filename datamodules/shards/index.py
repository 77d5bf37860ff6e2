"""Where each sample of a tar shard is, so that it can be read separately and its bytes can be trusted.

An index is beside its shard as SHARD.index.json: {"format", "bytes", "sha256" of the shard, and for each of its
samples "starts" and "ends" in bytes and the "crc32" of what is between, and "remarks" if the scan saw anything
that the numbers do not show}.
"""

import hashlib
import io
import json
import os
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import require_regular_file
from lightspan.core.files.foreign import BYTES, TooMuchError
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.shards.tars import group_members, read_members, split_name

FORMAT = 1
SUFFIX = ".index.json"
# How streams of gzip, bzip2, xz and zstandard begin.
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
_END = bytes(1024)  # the end mark of a tar


@dataclass(frozen=True)
class ShardIndex:
    """N samples of one shard, in the order of the shard.

    size: bytes of the whole shard. sha256: of the whole shard. starts, ends: int64 [N], bytes; crc32: uint32 [N].
    remarks: what was skipped or looks odd, one line each.
    """

    shard: ReadPath
    size: int
    sha256: str
    starts: np.ndarray
    ends: np.ndarray
    crc32: np.ndarray
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.starts)

    def to_json(self) -> str:
        document = {"format": FORMAT, "bytes": self.size, "sha256": self.sha256}
        document |= {"remarks": list(self.remarks)} if self.remarks else {}
        return json.dumps(document | {name: getattr(self, name).tolist() for name in ("starts", "ends", "crc32")})

    def where(self, number: int) -> str:
        """Names one sample in messages."""
        return f"shard {self.shard}: sample {number} at byte {self.starts[number]}"


def from_json(text: str | bytes, shard: str, source: str | None = None) -> ShardIndex:
    """The index of `shard` from its file's text. Raises: UserError if it is not such an index, naming `source`, which
    is the file beside the shard if None.
    """
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']}, but this lightspan reads {FORMAT}")
        starts, ends = (np.array(document[name], dtype=np.int64) for name in ("starts", "ends"))
        index = ShardIndex(
            shard,
            int(document["bytes"]),
            document["sha256"],
            starts,
            ends,
            np.array(document["crc32"], dtype=np.uint32),
            tuple(one_line(remark)[:400] for remark in document.get("remarks", ())),
        )
        if not re.fullmatch("[0-9a-f]{64}", index.sha256):
            raise ValueError("its sha256 is not valid")
        borders = np.stack([starts, ends], axis=1).ravel()  # raises if their numbers differ
        if (
            starts.ndim != 1
            or index.crc32.shape != starts.shape
            or (np.diff(borders) < 0).any()
            or not _within(borders, index.size)
        ):
            raise ValueError("its samples overlap or exceed the shard")
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{source or shard + SUFFIX} is not the index of a shard ({error}); delete it, and the shard is scanned "
            "instead"
        ) from error
    return index


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _within(borders: np.ndarray, size: int) -> bool:
    return not len(borders) or bool(borders[0] >= 0 and borders[-1] <= size)


def scan(path: Path, shard: str, max_member_bytes: int) -> tuple[ShardIndex, str | None]:
    """Reads a whole shard; returns (index, None), or (index of the complete samples before the damage, what is wrong).

    Args:
        path: the shard on this machine.
        shard: its name in messages and in the index.
        max_member_bytes: the largest member that is read.

    Raises: UserError for a compressed shard.
    """
    spans: list[tuple[int, int]] = []
    last: str | None = None
    keys: set[str] = set()
    apart: list[str] = []
    passed_over: list[str] = []
    damage = None
    require_regular_file(path, "shard")
    with path.open("rb") as stream:
        if stream.read(6).startswith(COMPRESSED):
            raise UserError(
                f"shard {shard} is compressed, so its samples cannot be read by position; unpack it to a plain "
                ".tar, or rewrite it with `lightspan data pack`"
            )
        stream.seek(0)
        try:
            for member in read_members(stream, shard, max_member_bytes):
                parts = split_name(member.name)
                if parts is None:
                    passed_over.append(member.name)
                    continue
                key = parts[0]
                start = spans.pop()[0] if key == last else member.start
                spans.append((start, member.end))
                if key != last and key in keys:
                    apart.append(key)
                keys.add(key)
                last = key
        except UserError as error:
            spans = spans[:-1]  # members of the last sample may be lost
            damage = f"{error} ({len(spans)} complete samples come before)"
            rest = os.fstat(stream.fileno()).st_size - (spans[-1][1] if spans else 0)
            if rest > BYTES.most:  # a sparse file would be hashed for hours
                raise UserError(f"{damage}; {rest:,} bytes after them cannot be read") from error
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = stream.tell()
        checks = []
        for start, end in spans:
            stream.seek(start)
            checks.append(zlib.crc32(stream.read(end - start)))
    borders = np.array(spans, dtype=np.int64).reshape(-1, 2)
    index = ShardIndex(shard, size, digest, borders[:, 0], borders[:, 1], np.array(checks, dtype=np.uint32))
    return replace(index, remarks=(*passed_over_remark(passed_over), *_apart_remark(apart))), damage


def passed_over_remark(names: list[str]) -> tuple[str, ...]:
    """On members that belong to no sample, one line or none."""
    if not names:
        return ()
    return (
        f"{len(names)} members belong to no sample and are skipped, the first: {names[0]!r} (names "
        "without an ending, and __LIKE_THIS__, which describe the shard)",
    )


def _apart_remark(keys: list[str]) -> tuple[str, ...]:
    if not keys:
        return ()
    return (
        f"{len(keys)} keys reappear after other samples, the first: {keys[0]!r}; each time counts as a sample "
        "of its own, since only members side by side form one",
    )


def read_sample(index: ShardIndex, number: int, path: Path, max_member_bytes: int) -> dict[str, Any]:
    """One sample of a shard on this machine, undecoded, as `group_members` returns it.

    Raises: UserError that names shard, sample and byte if it is missing, truncated, or not what the index says.
    """
    start, end = int(index.starts[number]), int(index.ends[number])
    try:
        with path.open("rb", buffering=0) as stream:
            # Before the read: a wrong index could ask for more bytes than there is memory.
            if end > os.fstat(stream.fileno()).st_size:
                raise UserError(f"{index.where(number)} is cut short; write or fetch the shard again")
            BYTES.require(end - start)
            stream.seek(start)
            content = stream.read(end - start)
    except TooMuchError as error:
        raise UserError(f"{index.where(number)} cannot be read: {error}") from error
    except OSError as error:
        raise UserError(f"{index.where(number)} cannot be read: {error}; restore the shard") from error
    return sample_of(index, number, content, max_member_bytes)


def sample_of(index: ShardIndex, number: int, content: bytes, max_member_bytes: int) -> dict[str, Any]:
    """One sample, undecoded, from its bytes, which are compared with the index. Raises: UserError as `read_sample`."""
    found = zlib.crc32(content)
    if found != index.crc32[number]:
        raise UserError(
            f"{index.where(number)} is damaged: its CRC-32 is {found:08x}, the index says {index.crc32[number]:08x}; "
            "write or fetch the shard again"
        )
    members = read_members(io.BytesIO(content + _END), index.shard, max_member_bytes)
    samples = list(group_members(members, index.shard))
    if len(samples) != 1:
        raise UserError(f"{index.where(number)}: {len(samples)} samples are there, so {SUFFIX} is not its index")
    return samples[0]
