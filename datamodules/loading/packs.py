"""What is decoded once and kept on disk.

Decoding takes milliseconds to seconds a file, and mapping what was decoded microseconds. All ranks, workers and later
runs read the same pack.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from filelock import FileLock

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import atomic_path, explained_os_errors
from lightspan.core.files.caches import CacheFolder
from lightspan.core.files.places import CachePath

ABOUT = "about.json"
SETTING = "data.init_args.cache_dir"
GIB = 2**30
T_co = TypeVar("T_co", covariant=True)


class Pack(Protocol[T_co]):
    """known: of each of its samples, the sha256 of what was decoded, `content`, or `damage`."""

    @property
    def known(self) -> Sequence[Mapping[str, Any]]: ...

    def read(self, number: int) -> T_co:
        """A sample."""


@dataclass(frozen=True)
class JoinedPacks(Generic[T_co]):
    """The samples of one or two folders, one after the other. labels: int64 [N]."""

    packs: Sequence[Pack[T_co]]
    labels: np.ndarray

    def read(self, number: int) -> T_co:
        first = len(self.packs[0].known)
        return self.packs[0].read(number) if number < first else self.packs[1].read(number - first)

    def content(self, train: np.ndarray) -> str:
        """What tells these samples of the first folder from others."""
        digest = hashlib.sha256(self.labels[train].tobytes() + train.tobytes())
        for number in train.tolist():
            digest.update(self.packs[0].known[number]["content"].encode())
        return digest.hexdigest()[:32]


class PackCache:
    """Folders of decoded samples by name. Before a new one is written, those used longest ago make room for it. In a
    dry run a pack that is there is read, and any other is written to a temporary folder.

    Args:
        folder: None means $XDG_CACHE_HOME/lightspan/KIND, usually below ~/.cache.
        kind: what is kept, such as "pictures".
        limit_gib: of all packs together.
    Raises: UserError for a limit of nothing.
    """

    def __init__(self, folder: CachePath | None, kind: str, limit_gib: float) -> None:
        if limit_gib <= 0:
            raise UserError(f"cache_gib={limit_gib} must be above 0")
        self.cache, self.limit_bytes = CacheFolder(folder, kind, SETTING), int(limit_gib * GIB)

    def require_room(self, size: int, what: str, way_out: str) -> None:
        """Raises: UserError for a pack of `size` bytes if it is larger than all packs may be."""
        if size > self.limit_bytes:
            raise UserError(
                f"{what} take {size / GIB:.1f} GiB decoded, above cache_gib={self.limit_bytes / GIB:g}; raise "
                f"data.init_args.cache_gib, {way_out}"
            )

    def pack(self, name: str, size: int, write: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
        """(folder of the pack, what is known about it), written now unless it is there; other processes wait meanwhile.

        Args:
            size: in bytes.
            write: fills an empty folder, and returns what is to be known about it, in JSON's types.
        """
        if (held := self.cache.held(f"{name}/{ABOUT}")) is not None:
            pack = held.parent
        else:
            part = self.cache.part()
            pack = part / name
            with explained_os_errors(pack, setting=SETTING), FileLock(pack.with_suffix(".lock")):
                if not (pack / ABOUT).is_file():
                    self._make_room(part, size)
                    with atomic_path(pack, setting=SETTING) as temporary:
                        temporary.mkdir()
                        about = write(temporary)
                        (temporary / ABOUT).write_text(json.dumps(about) + "\n")
                os.utime(pack)  # the time of its last use
        return pack, json.loads((pack / ABOUT).read_text())

    def _make_room(self, part: Path, incoming: int) -> None:
        packs = {about.parent: about.parent.stat().st_mtime for about in part.glob(f"*/{ABOUT}")}
        sizes = {pack: sum(file.stat().st_size for file in pack.iterdir()) for pack in packs}
        total = incoming + sum(sizes.values())
        for pack in sorted(packs, key=lambda pack: packs[pack]):
            if total <= self.limit_bytes:
                return
            # A run that has mapped it keeps it until it ends; the minute is for one that is about to.
            if packs[pack] < time.time() - 60:
                shutil.rmtree(pack, ignore_errors=True)
                total -= sizes[pack]


def file_state(path: Path) -> tuple[int, int]:
    """Size and time of a file, which change with its content; -1 of a link to nothing, as decoding will say."""
    try:
        stat = os.stat(path)
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns
