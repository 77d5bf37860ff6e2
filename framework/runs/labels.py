"""Tags and a note that people give to a run: two text files in its folder."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightspan.errors import UserError
from lightspan.files import read_small, write_atomic
from lightspan.run_files import NOTE, TAGS

LONGEST_NOTE = 10_000  # characters
_TAG = re.compile(r"[\w.:+@-]{1,64}")


def tags_of(run: Path) -> tuple[str, ...]:
    """The tags of a run, sorted; what is no tag in the file is left out."""
    text = (read_small(run / TAGS) or b"").decode(errors="replace")
    return tuple(sorted({tag for tag in text.split() if _TAG.fullmatch(tag)}))


def note_of(run: Path) -> str:
    """The note on a run, "" if there is none."""
    return (read_small(run / NOTE) or b"").decode(errors="replace").strip()[:LONGEST_NOTE]


def set_tags(run: Path, tags: Iterable[str]) -> None:
    """Replaces the tags of a run. Raises: UserError for what is no tag."""
    kept = sorted(set(tags))
    if wrong := [tag for tag in kept if not _TAG.fullmatch(tag)]:
        raise UserError(f"{wrong[0][:80]!r} is no tag: a tag is one word of at most 64 letters, digits and .:+@_-")
    _put(run / TAGS, kept)


def set_note(run: Path, note: str) -> None:
    """Replaces the note on a run, "" removes it. Raises: UserError for one that is too long."""
    if len(note) > LONGEST_NOTE:
        raise UserError(f"the note has {len(note):,} characters, but a note has at most {LONGEST_NOTE:,}; shorten it")
    _put(run / NOTE, note.strip().splitlines())


def _put(path: Path, lines: Sequence[str]) -> None:
    if lines:
        write_atomic(path, "\n".join(lines) + "\n", setting="RUN")
    else:
        path.unlink(missing_ok=True)
