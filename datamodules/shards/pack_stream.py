"""Samples of a tar that comes once, from its start, such as what another program writes or a server sends.

Samples of a stream have no positions, so no run could take up its place in one, nor could ranks share it out. It is
packed into shards first, in one pass; these have an index, and with it everything that `Shards` promises.

The webdataset library's iterator over a tar is not used here: it reads members of any size into memory, unpacks what is
compressed without a limit, and takes a stream that breaks off between two members for a whole one.
"""

import contextlib
import sys
from collections.abc import Iterator
from http.client import HTTPException
from typing import BinaryIO

from lightspan.core.errors import UserError, one_line
from lightspan.datamodules.shards.fetch import open_shard
from lightspan.datamodules.shards.index import COMPRESSED, passed_over_remark
from lightspan.datamodules.shards.pack_sources import Members
from lightspan.datamodules.shards.tars import TarMember, group_members, read_members, split_name

STANDARD_INPUT = "-"
LIMIT = "--max-member"


@contextlib.contextmanager
def opened(source: str) -> Iterator[BinaryIO]:
    """The bytes of standard input, for "-", or of an https address; never of a command.

    Raises: UserError for any other scheme, a terminal, a closed standard input, or a server's refusal.
    """
    if source != STANDARD_INPUT:
        with open_shard(source, "its address") as stream:
            yield stream
    elif sys.stdin is None or sys.stdin.closed:  # as after `<&-`
        raise UserError("- is standard input, which is closed; write `PROGRAM | lightspan data pack - ...`")
    elif sys.stdin.isatty():
        raise UserError("- is standard input, and that is a terminal; write `PROGRAM | lightspan data pack - ...`")
    else:
        yield sys.stdin.buffer


def samples_of(stream: BinaryIO, source: str, max_member_bytes: int, remarks: list[str]) -> Iterator[Members]:
    """The samples in the order of the stream, one at a time; at its end `remarks` gets lines on what may be unexpected.

    Args:
        source: its name in messages.
        max_member_bytes: the largest member that is read.

    Raises: UserError for a compressed stream, one that breaks off, and whatever else `read_members` refuses.
    """
    name = "of standard input" if source == STANDARD_INPUT else source
    passed_over: list[str] = []

    def noted(members: Iterator[TarMember]) -> Iterator[TarMember]:
        for member in members:
            if split_name(member.name) is None:
                passed_over.append(member.name)
            else:
                _require_utf8(member.name, name)
            yield member

    try:
        if stream.peek(6)[:6].startswith(COMPRESSED):  # type: ignore[attr-defined]  # of what is buffered
            raise UserError(
                f"shard {name} is compressed; unpack it on the way: `zcat FILE | lightspan data pack - ...`"
            )
        for sample in group_members(noted(read_members(stream, name, max_member_bytes, LIMIT)), name):
            key = sample["__key__"]
            yield {f"{key}.{ending}": sample[ending] for ending in sample if not ending.startswith("__")}
    except (HTTPException, OSError) as error:
        raise UserError(f"shard {name} broke off: {one_line(error)}; read it again from its start") from error
    remarks += passed_over_remark(passed_over)


def _require_utf8(member: str, name: str) -> None:
    try:
        member.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"shard {name}: the name {member!r} is not UTF-8, as shards need it; rename it") from error
