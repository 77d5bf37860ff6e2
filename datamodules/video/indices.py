"""The indices of many videos, made once and kept in the user's cache."""

import hashlib
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from filelock import FileLock
from rich.progress import track

from lightspan.core.errors import one_line
from lightspan.core.files.arrays import read_arrays
from lightspan.core.files.atomic import explained_os_errors, write_atomic
from lightspan.core.files.caches import CacheFolder
from lightspan.core.files.places import CachePath, PathUse
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.video.reader import VideoIndex, index_of

VERSION = 1  # raise it where the same file gives another index
SETTING = "data.init_args.cache_dir"


class IndexCache:
    """Indices of videos, told apart by the files' paths, sizes and times. One takes 8 bytes a frame, and 12 where the
    video was decoded for it.

    In a dry run an index that is there is read, and any other is written to a temporary folder.

    Args:
        folder: None means $XDG_CACHE_HOME/lightspan/videos, usually below ~/.cache.
    """

    def __init__(self, folder: CachePath | None) -> None:
        self.cache = CacheFolder(folder, "videos", SETTING)

    def indexed(self, paths: Sequence[Path], through: bool, num_workers: int) -> list[VideoIndex | str]:
        """The index of each video, or what is wrong with it; other processes wait meanwhile.

        Args:
            through: as in `index_of`.
            num_workers: processes that read.
        """
        names = [_name(path, through) for path in paths]
        part = self.cache.part()
        damage = dict[Path, str]()
        lock = part / "lightspan-videos.lock"
        with explained_os_errors(lock, setting=SETTING), FileLock(lock):
            new = [place for place, name in enumerate(names) if self._file(part, name) is None]
            making = _Making([paths[place] for place in new], [part / names[place] for place in new], through)
            silent = len(new) < 2 or not sys.stdout.isatty()
            loader = EvaluationLoader(making, 1, num_workers=min(num_workers, len(new)))
            for batch in track(loader, "indexing videos", transient=True, disable=silent):
                damage |= {
                    paths[new[int(at)]]: why for at, why in zip(batch["at"], batch["damage"], strict=True) if why
                }
        return [damage.get(path) or self._read(part, name) for path, name in zip(paths, names, strict=True)]

    def _file(self, part: Path, name: str) -> Path | None:
        return part / name if (part / name).is_file() else self.cache.held(name)

    def _read(self, part: Path, name: str) -> VideoIndex:
        file = self._file(part, name)
        assert file is not None
        arrays = read_arrays(file)
        return VideoIndex(arrays["ticks"], float(arrays["tick_s"]), arrays["change"])


@dataclass(frozen=True)
class _Making:
    """The videos that have no index yet; each sample writes one."""

    videos: Sequence[Annotated[Path, PathUse.READ]]
    files: Sequence[Annotated[Path, PathUse.CACHE]]
    through: bool

    def __len__(self) -> int:
        return len(self.videos)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        try:
            made = index_of(self.videos[index], self.through)
        except (ValueError, OSError) as error:
            return {"at": index, "damage": one_line(str(error)) or type(error).__name__}
        content = io.BytesIO()
        np.savez(content, ticks=made.ticks, tick_s=np.array(made.tick_s), change=made.change)
        write_atomic(self.files[index], content.getvalue(), SETTING)
        return {"at": index, "damage": ""}


def _name(path: Path, through: bool) -> str:
    try:
        stat = os.stat(path)
        state = (stat.st_size, stat.st_mtime_ns)
    except OSError:  # a link to nothing: reading says so
        state = (-1, -1)
    said = json.dumps([VERSION, through, os.path.realpath(path), *state])
    return f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.npz"
