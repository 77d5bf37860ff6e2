"""Compares packed shards with what was written, and writes an index for shards that have none."""

from pathlib import Path

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import irregular
from lightspan.core.files.foreign import content_of, whole_text
from lightspan.datamodules.shards.index import SUFFIX, ShardIndex, from_json, read_sample, scan, sha256_of
from lightspan.datamodules.shards.pack import SUMS_FILE
from lightspan.datamodules.shards.shelves import Shelf

NO_LIMIT = 2**63  # of a member's size: these are the user's own shards


def listed(shelf: Shelf) -> dict[str, str]:
    """{name of a file: its sha256} as written by `pack`. Raises: UserError if there is no such list."""
    path, shown = shelf.at_hand(SUMS_FILE), shelf.shown(SUMS_FILE)
    if reason := irregular(path):
        raise UserError(f"{shown} {reason}; only folders that `data pack` wrote can be verified")
    try:
        lines = whole_text(path).splitlines()
    except ValueError as error:
        raise UserError(
            f"{shown} cannot be read ({error}); only folders that `data pack` wrote can be verified"
        ) from error
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    wrong = [name for name in sums if not name or Path(name).name != name or "\0" in name]
    if wrong or not sums:
        raise UserError(f"{shown} is not a list of sha256 sums of files beside it; pack the folder again")
    return sums


def unlisted(shelf: Shelf, sums: dict[str, str]) -> list[str]:
    """Names of what is there but was not written by `pack`. Hidden files do not count."""
    return [name for name in shelf.names() if not name.startswith(".") and name not in {SUMS_FILE, *sums}]


def problem_of(shelf: Shelf, name: str, sha256: str) -> str | None:
    """What is wrong with a packed file, for a shard down to its first damaged samples; None if nothing is."""
    path, shown = shelf.at_hand(name), shelf.shown(name)
    if reason := irregular(path):
        return f"{shown} {reason}"
    try:
        if sha256_of(path) == sha256:
            return None
    except OSError as error:
        return f"{shown} cannot be read ({error.strerror})"
    found = f"{shown}: its sha256 is not the recorded one"
    index = _index(shelf, name) if name.endswith(".tar") else None
    if index is None:
        return found
    path, damaged = shelf.at_hand(name), []
    for number in range(len(index)):
        try:
            read_sample(index, number, path, NO_LIMIT)
        except UserError:
            damaged.append(f"{number} (byte {index.starts[number]})")
    more = ", ".join(damaged[:10]) + (", ..." if damaged[10:] else "")
    return f"{found}; {len(damaged)} of {len(index)} samples are damaged{': ' + more if damaged else ''}"


def _index(shelf: Shelf, name: str) -> ShardIndex | None:
    """Of the shard of this name; None if there is none that can be read."""
    try:
        return from_json(content_of(shelf.at_hand(f"{name}{SUFFIX}")), shelf.shown(name))
    except ValueError:
        return None


def without_index(shelf: Shelf) -> list[str]:
    """Names of the shards, NAME.tar, that have no index. Raises: UserError if there is no shard."""
    names = shelf.names()
    shards = [name for name in names if name.endswith(".tar")]
    if not shards:
        raise UserError(f"{shelf.shown('')} contains no .tar file; name the folder of the shards")
    return [name for name in shards if f"{name}{SUFFIX}" not in names]


def write_index(shelf: Shelf, name: str) -> tuple[int, tuple[str, ...]]:
    """Writes the index of a shard beside it; returns (its samples, remarks). Raises: UserError if it is damaged."""
    shown = shelf.shown(name)
    index, damage = scan(shelf.at_hand(name), shown, NO_LIMIT)
    if damage is not None:
        raise UserError(f"{damage}; it gets no index")
    shelf.write(f"{name}{SUFFIX}", index.to_json())
    return len(index), tuple(f"{shown}: {remark}" for remark in index.remarks)
