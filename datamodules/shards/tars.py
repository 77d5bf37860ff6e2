"""Reads WebDataset tar shards that may come from strangers: members of plain tars, grouped into samples, undecoded.

WebDataset's convention: adjacent members `KEY.ENDING` form one sample, and what is named like `__THIS__`
describes the shard. Of the webdataset library only the rule that splits names is used: its opener runs what follows
`pipe:` in a shell, its decoder unpickles, and its expander has no limit on sizes.
"""

import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from webdataset.tariterators import base_plus_ext

from lightspan.core.errors import UserError, one_line

META = re.compile(r"__[^/]*__($|/)")  # members that describe the shard, by WebDataset's convention

MOST_PADDING = 2**26
"""Bytes of zeros after the end mark; writers fill up blocks of some kilobytes."""


MOST_EXTENDED = 2**16
"""Bytes of a header that extends the next one: a long name, or attributes, which tarfile searches in quadratic time."""
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class TarMember(NamedTuple):
    """A regular file of a tar. Its headers and padded content are bytes [start, end) of the tar."""

    name: str
    content: bytes
    start: int
    end: int


def read_members(
    stream: BinaryIO, shard: str, max_member_bytes: int, setting: str = "data.init_args.max_member_mib"
) -> Iterator[TarMember]:
    """The regular files in a plain tar, in order; `stream` is read once, from its start, and need not seek.

    Args:
        shard: its name in messages.
        setting: what raises the limit, in messages.

    Raises: UserError that names the shard if it is not a tar, is cut short, continues after its end mark, or contains a
        link, a device, a name that leaves its folder, or a member above `max_member_bytes`.
    """

    def check_size(header: tarfile.TarInfo) -> None:
        if header.size > max_member_bytes:
            raise UserError(
                f"shard {shard}: member {one_line(header.name)} has {header.size:,} bytes, above the limit of "
                f"{max_member_bytes:,}; raise {setting} if you trust the shard"
            )

    class Header(tarfile.TarInfo):
        """Checks every header block, including those of long names, before their content is read."""

        end_seen = False  # a complete tar ends in blocks of zeros; tarfile accepts tars without them

        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
            Header.end_seen = Header.end_seen or (len(buf) == tarfile.BLOCKSIZE and not any(buf))
            header = super().frombuf(buf, encoding, errors)
            check_size(header)
            if header.type in _EXTENDED and header.size > MOST_EXTENDED:
                raise UserError(
                    f"shard {shard} has a name or attributes of {header.size:,} bytes, above the limit of "
                    f"{MOST_EXTENDED:,}; write it again with shorter names and without extended attributes"
                )
            return header

    end = 0
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=Header) as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                name, what = PurePosixPath(member.name), f"shard {shard}: member {one_line(member.name)}"
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(f"{what} is a link, a device or sparse; only files are read")
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(f"{what} leaves its folder; pack it with relative names")
                check_size(member)  # again: an extended header may have changed the size
                content = archive.extractfile(member)
                assert content is not None
                data = content.read()
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                yield TarMember(member.name, data, member.offset, end)
            complete, padding = Header.end_seen, 0
            while complete and (block := archive.fileobj.read(2**20)):
                if (padding := padding + len(block)) > MOST_PADDING:
                    raise UserError(
                        f"shard {shard} has more than {MOST_PADDING:,} bytes of nothing after its end, byte {end}; "
                        "write or fetch it again"
                    )
                if block.strip(b"\0"):
                    raise UserError(
                        f"shard {shard} continues after the end mark at byte {end}, like tars that were joined without "
                        "`tar --concatenate`; no reader sees what is there, so write it as separate shards"
                    )
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"shard {shard} is not a tar file, or is cut short after byte {end} ({error}); write or fetch it again"
        ) from error
    if not complete:
        raise UserError(f"shard {shard} is cut short after byte {end}: it has no end mark; write or fetch it again")


def split_name(name: str) -> tuple[str, str] | None:
    """(key, ending in lower case) of a member, split at the first dot of its own name; None if it is no sample's."""
    key, ending = (None, None) if META.match(name) else base_plus_ext(name)
    return None if key is None or ending is None else (key, ending.lower())


def group_members(members: Iterable[TarMember], shard: str) -> Iterator[dict[str, Any]]:
    """Samples, undecoded: {"__key__": name without ending, "__url__": `shard`, ending in lower case: bytes, ...}.

    Members that belong to no sample are skipped. Raises: UserError for two members of the same name.
    """
    sample: dict[str, Any] = {}
    for member in members:
        parts = split_name(member.name)
        if parts is None:
            continue
        key, ending = parts
        if key != sample.get("__key__"):
            if sample:
                yield sample
            sample = {"__key__": key, "__url__": shard}
        if ending in sample:
            raise UserError(
                f"shard {shard}: {one_line(member.name)} occurs twice; give each member of a sample its own ending"
            )
        sample[ending] = member.content
    if sample:
        yield sample
