"""The indices of many videos, made once and kept in the user's cache."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.progress import track

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.arrays import read_arrays
from lightspan.core.files.places import CachePath, PathUse
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.packs import PackCache, file_state
from lightspan.datamodules.video.reader import VideoIndex, index_of

VERSION = 1  # raise it where the same file gives another index
INDEX = "index.npz"
GIB = 1.0
"""Of all indices: 12 bytes a frame, 25 MB for a day of 25 frames a second."""


class IndexCache:
    """Indices of videos, told apart by the files' paths, sizes and times.

    Args:
        folder: None means $XDG_CACHE_HOME/lightspan/videos, usually below ~/.cache.
    """

    def __init__(self, folder: CachePath | None) -> None:
        self.packs = PackCache(folder, "videos", GIB)

    def indexed(self, paths: Sequence[Path], through: bool, num_workers: int) -> list[VideoIndex | str]:
        """The index of each video, or what is wrong with it.

        Args:
            through: as in `index_of`.
            num_workers: processes that read.
        """
        making = _Making(paths, self.packs, through)
        silent = len(paths) < 2 or not sys.stdout.isatty()
        loader = EvaluationLoader(making, 1, num_workers=min(num_workers, len(paths)))
        made = track(loader, "indexing videos", transient=True, disable=silent)
        return [batch["damage"][0] or _read(Path(batch["pack"][0])) for batch in made]


def _read(pack: Annotated[Path, PathUse.READ]) -> VideoIndex:
    arrays = read_arrays(pack / INDEX)
    return VideoIndex(arrays["ticks"], float(arrays["tick_s"]), arrays["change"])


@dataclass(frozen=True)
class _Making:
    """Videos as a loader fetches them: the pack of each one's index, written now unless it is there, and what is wrong
    with it.
    """

    videos: Sequence[Annotated[Path, PathUse.READ]]
    packs: PackCache
    through: bool

    def __len__(self) -> int:
        return len(self.videos)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        video = self.videos[index]

        def write(pack: Path) -> dict[str, Any]:
            made = index_of(video, self.through)
            np.savez(pack / INDEX, ticks=made.ticks, tick_s=np.array(made.tick_s), change=made.change)
            return {"video": str(video)}

        said = json.dumps([VERSION, self.through, os.path.realpath(video), *file_state(video)])
        try:
            pack, _ = self.packs.pack(hashlib.sha256(said.encode()).hexdigest()[:32], 0, write)
        except UserError:  # of this machine, not of the video
            raise
        except (ValueError, OSError) as error:
            return {"pack": "", "damage": one_line(str(error)) or type(error).__name__}
        return {"pack": str(pack), "damage": ""}
