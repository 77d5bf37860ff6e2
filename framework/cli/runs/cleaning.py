"""Deleting runs that nobody needs: what would go, what stays and why, and the deletion itself."""

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightspan.cli.runs.catalogue import MARKS, Entry
from lightspan.cli.runs.folder import sole_use
from lightspan.cli.runs.status import Status, status_of
from lightspan.core.errors import UserError
from lightspan.core.files import runs as run_files
from lightspan.core.files.atomic import leftovers, remove

USELESS = (Status.FAILED, Status.STALE, Status.UNSTARTED)
"""What is cleaned if no status is named."""
OWN_NAMES = frozenset(value for value in vars(run_files).values() if isinstance(value, str)) | {
    *("export", "masks.safetensors", "report", "shards", "tensorboard", "wandb"),
}
_OWN_SERIES = re.compile(r"metrics-\d+\.jsonl")


@dataclass(frozen=True)
class Deletable:
    """A run that would be deleted, with the bytes of its files."""

    entry: Entry
    size: int


@dataclass(frozen=True)
class Kept:
    """A selected run that must not be deleted, and why."""

    entry: Entry
    reason: str


def look(entries: Sequence[Entry], with_tags: bool = False) -> tuple[list[Deletable], list[Kept]]:
    """Divides runs into those that can be deleted and those that are kept whatever is asked for.

    Kept are runs in which a process works, folders that hold something else than a run or another run, links, and runs
    with a tag.

    Args:
        with_tags: whether runs with tags may go.
    """
    deletable, kept = [], []
    for entry in entries:
        reason, size = _looked_into(entry.folder)
        if entry.status is Status.RUNNING:
            reason = "it is running"
        elif entry.tags and not with_tags:
            reason = f"it is tagged {' '.join(entry.tags)}"
        if reason:
            kept.append(Kept(entry, reason))
        else:
            deletable.append(Deletable(entry, size))
    return deletable, kept


def delete(deletable: Deletable) -> None:
    """Deletes a run folder as a whole, and nothing that a link in it leads to; a missing folder is fine.

    Raises: UserError if a process has begun to work in it since it was looked at, if it is another run than it was
        then, or if it cannot be removed.
    """
    named = deletable.entry.folder
    run = named.parent.resolve() / named.name if named.name not in ("", "..") else named.resolve()  # it is renamed
    if not run.is_dir():
        return
    if (now := status_of(run)) is not deletable.entry.status:
        raise UserError(f"{named} is kept: it was {deletable.entry.status} and is {now} now")
    with contextlib.suppress(FileNotFoundError), sole_use(run, wait_s=0):
        if reason := _looked_into(run)[0]:
            raise UserError(f"{named} is kept: {reason}")
        remove(run)


def _looked_into(run: Path) -> tuple[str | None, int]:
    """(why this folder must not be deleted, bytes of its files); links are never followed."""
    if run.is_symlink():
        return "it is a link", 0
    try:
        inside = os.listdir(run)
    except OSError as error:
        return f"it cannot be read: {error.strerror}", 0
    own = {path.name for path in leftovers(run)}
    foreign = sorted(name for name in inside if not (name in OWN_NAMES or name in own or _OWN_SERIES.fullmatch(name)))
    if foreign:
        return f"it holds {foreign[0]!r}, which is not lightspan's; delete that, or the folder, by hand", 0
    size = 0
    for folder, _, names in os.walk(run):
        if Path(folder) != run and MARKS.intersection(names):
            return f"it contains the run {Path(folder).relative_to(run)}", 0
        size += sum(_size(Path(folder, name)) for name in names)
    return None, size


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # gone meanwhile
        return 0
