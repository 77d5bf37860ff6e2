"""Tags and a note that people give to a run: two text files in its folder, which are never links."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import explained_os_errors, read_small, write_atomic
from lightspan.core.files.runs import NOTE, TAGS

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

LONGEST_NOTE = 10_000  # characters
_TAG = re.compile(r"[\w.:+@-]{1,64}")


def tags_of(run: Path) -> tuple[str, ...]:
    """The tags of a run, sorted; what is no tag in the file is left out."""
    text = _text(run / TAGS)
    return tuple(sorted({tag for tag in text.split() if _TAG.fullmatch(tag)}))


def note_of(run: Path) -> str:
    """The note on a run, "" if there is none."""
    return _text(run / NOTE).strip()[:LONGEST_NOTE]


def _text(path: Path) -> str:
    """Of a file of this run alone: a folder of somebody else may have a link to a file of the reader there."""
    return (read_small(path, links=False) or b"").decode(errors="replace")


@contextlib.contextmanager
def sole_labeller(run: Path) -> Iterator[None]:
    """Until it ends no other process is in here for this run, so that what it read is still so when it writes.

    The run's own lock will not do: it is held while the run goes on. Where the file system cannot lock a folder,
    nothing is locked.
    """
    if fcntl is None:
        yield
        return
    with explained_os_errors(run, "open", setting="RUN"):
        descriptor = os.open(run, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def set_tags(run: Path, tags: Iterable[str]) -> None:
    """Replaces the tags of a run. Raises: UserError for what is no tag, and for a link in their place."""
    kept = sorted(set(tags))
    if wrong := [tag for tag in kept if not _TAG.fullmatch(tag)]:
        raise UserError(f"{wrong[0][:80]!r} is no tag: a tag is one word of at most 64 letters, digits and .:+@_-")
    _put(run / TAGS, kept)


def set_note(run: Path, note: str) -> None:
    """Replaces the note on a run, "" removes it.

    Raises: UserError for one that is too long or is no text, and for a link in its place.
    """
    try:
        note.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the note is no UTF-8 at character {error.start + 1}; write it anew") from error
    if len(note) > LONGEST_NOTE:
        raise UserError(f"the note has {len(note):,} characters, but a note has at most {LONGEST_NOTE:,}; shorten it")
    _put(run / NOTE, note.strip().splitlines())


def _put(path: Path, lines: Sequence[str]) -> None:
    if path.is_symlink():
        raise UserError(f"{path} is a link, but what is said about a run is in files of its own; remove the link")
    if lines:
        write_atomic(path, "\n".join(lines) + "\n", setting="RUN")
    else:
        with explained_os_errors(path, "remove", setting="RUN"):
            path.unlink(missing_ok=True)
