"""What is kept from run to run in the user's cache, and deleted there to make room: nothing else ever is."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded, make_folder, read_small, write_atomic

KEY, LOCK = "lightspan-cache.key", "lightspan-cache.lock"
_instead: Path | None = None  # where caches made inside `isolated_caches` write


def user_cache() -> Path:
    """$XDG_CACHE_HOME/lightspan, usually ~/.cache/lightspan; `~` is not expanded."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lightspan"


@contextlib.contextmanager
def isolated_caches(folder: Path) -> Iterator[None]:
    """Caches made inside write below `folder`, and only read what they held before: for what must leave no trace."""
    global _instead
    before, _instead = _instead, folder
    try:
        yield
    finally:
        _instead = before


class CacheFolder:
    """A folder shared by all runs. Nothing else is ever in the part of it where a cache keeps its files and deletes
    them: a sub-folder with a random name, which KEY beside it records.

    Args:
        given: the folder; None means the one of this kind in the user's cache.
        kind: what is kept, such as "pictures".
        setting: what chooses the folder, for messages.
    """

    def __init__(self, given: str | None, kind: str, setting: str) -> None:
        self.folder = expanded(given or user_cache() / kind, setting)
        self.setting, self._instead = setting, None if _instead is None else _instead / kind

    def held(self, name: str) -> Path | None:
        """Where a file or folder of this name is, if the cache has it and is to change nothing itself."""
        if self._instead is None or (part := self._part(self.folder)) is None:
            return None
        return part / name if (part / name).exists() else None

    def part(self) -> Path:
        """Where files are kept, made now if it is missing. Raises: UserError if it cannot be made, or is a link."""
        folder = self._instead or self.folder
        make_folder(folder, self.setting)
        with FileLock(folder / LOCK):
            if not (folder / KEY).exists():
                write_atomic(folder / KEY, secrets.token_hex(16) + "\n", self.setting)
        part = self._part(folder)
        assert part is not None
        make_folder(part, self.setting)
        return part

    def _part(self, folder: Path) -> Path | None:
        if not (folder / KEY).exists():
            return None
        name = (read_small(folder / KEY, 64, links=False) or b"").decode(errors="replace").strip()
        if not re.fullmatch(r"[0-9a-f]{32}", name) or (folder / name).is_symlink():
            raise UserError(
                f"{folder / KEY} does not name the part of this folder that is a cache; remove that file, or choose "
                f"another folder with {self.setting}"
            )
        return folder / name
