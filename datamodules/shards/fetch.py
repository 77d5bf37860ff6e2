"""Names of shards, and streams of their bytes: regular files on this machine, and within time limits https and object
stores.
"""

import itertools
import re
import ssl
import time
import urllib.request
from http import HTTPStatus
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import expanded, require_regular_file
from lightspan.core.files.stores import SCHEME, STORES, ObjectStream, in_store, read_range, require_object

MAX_SHARDS = 100_000  # what one pattern may expand to
TIMEOUT_S = 60.0  # without a byte from the server
# The least that a server must send in each such waiting time. Together with a limit on bytes, which every
# reader has, this ends every fetch, even one that only trickles.
PACE_S, PACE_BYTES = 60.0, 2**20


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..002}.tar` and `{a,b}.tar` expanded, in order; several groups give every combination.

    Raises: UserError if there would be more than MAX_SHARDS names.
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


def check_shard(shard: str) -> None:
    """Raises: UserError unless `shard` can be a local path, an https address, or an object of a store."""
    if not shard or "\0" in shard:
        raise UserError(f"shard {shard!r} is not the name of a file; correct data.init_args.shards")
    scheme = SCHEME.match(shard)
    if in_store(shard):
        require_object(shard, "data.init_args.shards")
    elif scheme and scheme[1].lower() != "https":
        raise UserError(
            f"shard {shard} is neither a local path nor https nor in a store ({', '.join(STORES)}); {scheme[1]}: is "
            "refused, because it could run a command or be read unencrypted; download it, or serve it over https; "
            "write a file name with a colon as ./NAME"
        )
    elif scheme:
        try:
            parts = urlsplit(shard)
            named = bool(parts.hostname) and parts.port != 0
        except ValueError:
            named = False
        if not named:
            raise UserError(f"shard {shard} is not an https address; write https://HOST/NAME.tar")


def local_path(shard: str) -> Path:
    """Raises: UserError for the home folder of a user who does not exist."""
    return expanded(shard, "data.init_args.shards")


def open_shard(shard: str, setting: str = "data.init_args.shards") -> BinaryIO:
    """A stream of the shard's bytes. Reading raises TimeoutError where a server stalls or drips.

    Args:
        setting: what names the shard, in messages.

    Raises: UserError for any other scheme, a missing file, what is no regular file, or a server's refusal.
    """
    check_shard(shard)
    try:
        if in_store(shard):
            return cast(BinaryIO, ObjectStream(shard))
        if SCHEME.match(shard):
            return cast(BinaryIO, _opener().open(shard, timeout=TIMEOUT_S))
        path = local_path(shard)
        path.stat()  # says more clearly than the next line what is missing
        require_regular_file(path, "shard")
        return path.open("rb")
    except UserError:
        raise
    except (OSError, HTTPException, ValueError) as error:  # urllib's own errors are OSErrors, a malformed redirect none
        raise UserError(f"shard {shard} cannot be opened: {one_line(error)}; correct {setting}") from error


def read_span(shard: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a remote shard, and no others.

    Raises: UserError as `open_shard`, for a shard that ends before, and for a server that sends whole files alone.
    """
    try:
        if in_store(shard):
            return read_range(shard, start, end)
        request = urllib.request.Request(shard, headers={"Range": f"bytes={start}-{end - 1}"})
        with _opener().open(request, timeout=TIMEOUT_S) as answer:
            if answer.status != HTTPStatus.PARTIAL_CONTENT:
                raise UserError(
                    f"shard {shard} cannot be read in parts, since its server sends whole files; have copies of its "
                    "shards kept with data.init_args.cache_gib above 0"
                )
            content: bytes = answer.read(end - start)
        if len(content) != end - start:
            raise IncompleteRead(content, end - start - len(content))
    except UserError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(f"shard {shard}, bytes {start:,} to {end:,}, cannot be read: {one_line(error)}") from error
    return content


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """A redirect must stay on https."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        check_shard(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _PacedSocket(ssl.SSLSocket):
    """Gives up on a server that trickles. A plain timeout restarts with each byte, in headers and in content."""

    _waited_s, _received = 0.0, 0

    def recv_into(self, *arguments: Any, **more: Any) -> int:
        begin = time.monotonic()
        received = super().recv_into(*arguments, **more)
        self._waited_s += time.monotonic() - begin  # only for the server: this side may be slow to write
        self._received += received
        if self._waited_s >= PACE_S:
            if self._received < PACE_BYTES:
                raise TimeoutError(
                    f"the server sent {self._received:,} bytes in {self._waited_s:.0f} s, too slow to wait for"
                )
            self._waited_s, self._received = 0.0, 0
        return received


def _opener() -> urllib.request.OpenerDirector:
    context = ssl.create_default_context()
    context.sslsocket_class = _PacedSocket
    return urllib.request.build_opener(_HttpsOnly, urllib.request.HTTPSHandler(context=context))
