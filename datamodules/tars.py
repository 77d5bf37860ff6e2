"""Reads WebDataset tar shards that may come from strangers: own opener, explicit decoders, nothing run or unpickled.

The webdataset library groups the members of a shard into samples. It does not open or decode here: its opener runs what
follows `pipe:` in a shell, its decoder unpickles, and its expander has no limit on sizes.
"""

import io
import itertools
import json
import re
import socket
import ssl
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from webdataset.tariterators import base_plus_ext, group_by_keys

from lightspan.errors import UserError

MAX_SHARDS = 100_000  # what one pattern may expand to
MAX_PIXELS = 2**26  # of one image, before it is decoded
TIMEOUT_S = 60  # without a byte from the server
PAUSES_S = (1.0, 4.0, 15.0)  # before each new attempt at a fetch that failed
T = TypeVar("T")
SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+):")  # one letter alone is a drive
META = re.compile(r"__[^/]*__($|/)")  # members that describe the shard, by WebDataset's convention


# From patterns to open streams


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..002}.tar` and `{a,b}.tar` written out, in order; several groups give every combination.

    Raises: UserError where there would be more than MAX_SHARDS names.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)  # text, group, text, group, ..., text
    choices: list[list[str] | range] = []
    widths: list[int] = []
    count = 1
    for place, part in enumerate(parts):
        bounds = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", part) if place % 2 else None
        if bounds:
            first, last = int(bounds[1]), int(bounds[2])
            choices.append(range(first, last + 1))
            widths.append(len(bounds[1]))
        else:
            choices.append(part.split(",") if place % 2 else [part])
            widths.append(0)
        count *= len(choices[-1])
    if not 0 < count <= MAX_SHARDS:
        raise UserError(
            f"shard pattern {pattern} stands for {count:,} shards, which must be 1 to {MAX_SHARDS:,}; ranges must rise"
        )
    names = ([str(value).zfill(width) for value in choice] for choice, width in zip(choices, widths, strict=True))
    return ["".join(combination) for combination in itertools.product(*names)]


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """A redirect must not leave https."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        check_shard(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def check_shard(shard: str) -> None:
    """Raises: UserError unless `shard` is a local path or an https address."""
    scheme = SCHEME.match(shard)
    if scheme and scheme[1].lower() != "https":
        raise UserError(
            f"shard {shard} is neither a local path nor https ({scheme[1]}: is refused, because it could run a command "
            "or be read in the clear); download it, or serve it over https; a file name with a colon is written ./NAME"
        )


def open_shard(shard: str) -> BinaryIO:
    """A stream of the shard's bytes. Raises: UserError for any other scheme, a missing file or a server's refusal."""
    check_shard(shard)
    try:
        if SCHEME.match(shard):
            return cast(BinaryIO, urllib.request.build_opener(_HttpsOnly).open(shard, timeout=TIMEOUT_S))
        return Path(shard).expanduser().open("rb")
    except (OSError, HTTPException) as error:  # urllib's own errors are OSErrors
        raise UserError(f"shard {shard} cannot be opened: {error}; correct data.init_args.shards") from error


def retried(fetch: Callable[[], T]) -> T:
    """`fetch()`, once more after each of PAUSES_S where the network or the server may only have stumbled.

    Raises: the UserError of `fetch` that is caused by anything else, or of the last attempt, with their number.
    """
    for pause_s in PAUSES_S:
        try:
            return fetch()
        except UserError as error:
            if not _may_pass(error.__cause__):
                raise
            print(f"lightspan: {error}; once more in {pause_s:g} s", file=sys.stderr, flush=True)
            time.sleep(pause_s)
    try:
        return fetch()
    except UserError as error:
        raise UserError(f"{error} (attempt {len(PAUSES_S) + 1}, the last)") from error.__cause__


def _may_pass(cause: BaseException | None) -> bool:
    if isinstance(cause, urllib.error.HTTPError):
        return cause.code in (408, 425, 429) or cause.code >= 500  # too slow, too early, too many, not our fault
    if isinstance(cause, urllib.error.URLError) and isinstance(cause.reason, BaseException):
        cause = cause.reason
    if isinstance(cause, ssl.SSLCertVerificationError):
        return False
    if isinstance(cause, socket.gaierror):
        return cause.errno == socket.EAI_AGAIN
    return isinstance(cause, HTTPException | ConnectionError | TimeoutError | ssl.SSLError)


# From streams to samples


class Member(NamedTuple):
    """A regular file of a tar. Its headers and padded content lie in bytes [start, end) of the unpacked tar."""

    name: str
    content: bytes
    start: int
    end: int


def read_members(stream: BinaryIO, shard: str, max_member_bytes: int) -> Iterator[Member]:
    """The regular files in a tar, plain or compressed, in order. `shard` is its name in messages.

    Raises: UserError that names the shard where it is no tar, is cut short, or holds a link, a device, a name that
        leaves its folder, or a member above `max_member_bytes`.
    """

    def check_size(header: tarfile.TarInfo) -> None:
        if header.size > max_member_bytes:
            raise UserError(
                f"shard {shard}: member {header.name} has {header.size:,} bytes, above the limit of "
                f"{max_member_bytes:,}; raise data.init_args.max_member_mib if you trust the shard"
            )

    class Header(tarfile.TarInfo):
        """Sees every header block, also those of long names, before their content is read."""

        end_seen = False  # a whole tar ends in blocks of zeros; tarfile is content without them

        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
            Header.end_seen = Header.end_seen or (len(buf) == tarfile.BLOCKSIZE and not any(buf))
            header = super().frombuf(buf, encoding, errors)
            check_size(header)
            return header

    end = 0
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=Header) as archive:
            for member in archive:
                name = member.name
                if member.isdir() or META.match(name):
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(f"shard {shard}: member {name} is a link, a device or sparse; only files are read")
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise UserError(f"shard {shard}: member {name} leaves its folder; pack it with relative names")
                check_size(member)  # once more: an extended header may have changed the size
                content = archive.extractfile(member)
                assert content is not None
                data = content.read()
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                yield Member(name, data, member.offset, end)
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
        complete = Header.end_seen
    except (tarfile.TarError, OSError, EOFError, HTTPException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"shard {shard} is not a tar file, or is cut short after byte {end} ({error}); write or fetch it again"
        ) from error
    if not complete:
        raise UserError(f"shard {shard} is cut short after byte {end}: it has no end mark; write or fetch it again")


def sample_key(name: str) -> str | None:
    """The key of the sample that a member belongs to: its name up to the first dot; None for one that has no ending."""
    key: str | None = base_plus_ext(name)[0]
    return key


def group_members(members: Iterable[Member], shard: str) -> Iterator[dict[str, Any]]:
    """Samples, undecoded: {"__key__": name without ending, ending in lower case: bytes, ...}.

    Raises: UserError for two members of one name.
    """
    try:
        yield from group_by_keys({"fname": member.name, "data": member.content, "__url__": shard} for member in members)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"shard {shard}: {error.args[0]}; give each member of a sample its own ending") from error


# From bytes to values


def decode_image(content: bytes) -> Tensor:
    """uint8 [3, H, W]. Raises: ValueError for an image above MAX_PIXELS, OSError for what is no image."""
    with Image.open(io.BytesIO(content), formats=["JPEG", "PNG", "WEBP"]) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are above the limit of {MAX_PIXELS:,}")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def decode_array(content: bytes) -> Tensor:
    """The tensor of a .npy file. Raises: ValueError for an array of objects, which would need pickle."""
    return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))


def decode_text(content: bytes) -> str:
    return content.decode("utf-8")


def decode_int(content: bytes) -> int:
    return int(content.decode("ascii"))


DECODERS: dict[str, Callable[[bytes], Any]] = {
    "jpg": decode_image,
    "jpeg": decode_image,
    "png": decode_image,
    "webp": decode_image,
    "cls": decode_int,
    "txt": decode_text,
    "json": json.loads,
    "npy": decode_array,
}


# What the decoders raise on bytes that are not what their ending says; Pillow and json add the last three.
_UNDECODABLE = (
    ValueError,
    TypeError,
    OSError,
    EOFError,
    MemoryError,
    SyntaxError,
    RecursionError,
    Image.DecompressionBombError,
)


def check_fields(fields: dict[str, str]) -> None:
    """Raises: UserError for an ending that has no decoder."""
    if not fields:
        raise UserError('fields is empty, so batches would be too; write for instance {image: "jpg|png", label: cls}')
    for field, endings in fields.items():
        for ending in endings.split("|"):
            if ending not in DECODERS:
                pickled = "; pickled members are never read" if ending in {"pkl", "pickle", "pyd", "pth", "pt"} else ""
                raise UserError(
                    f"fields: {field} asks for .{ending} members, which have no decoder{pickled}; decoders exist for "
                    + ", ".join(DECODERS)
                )


def decode_fields(sample: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """{field: value}, each from the first of its endings (`"jpg|png"`) that the sample has.

    Raises: UserError that names shard and sample where none is there or its bytes are not what the ending says.
    """
    where = f"shard {sample['__url__']}: sample {sample['__key__']}"
    decoded = {}
    for field, endings in fields.items():
        ending = next((ending for ending in endings.split("|") if ending in sample), None)
        if ending is None:
            there = ", ".join(name for name in sample if not name.startswith("__"))
            raise UserError(f"{where} has no .{endings.replace('|', ' or .')} member for {field}; it has {there}")
        try:
            decoded[field] = DECODERS[ending](sample[ending])
        except _UNDECODABLE as error:
            raise UserError(f"{where}: its .{ending} member cannot be decoded: {error}") from error
    return decoded
