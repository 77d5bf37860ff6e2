"""Shapes read once, into files that all ranks, workers and later runs map.

Shapes: N points, F triangles.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.progress import track

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.foreign import NUMBERS, TRIANGLES
from lightspan.core.files.places import CachePath, PathUse
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.packs import PackCache, file_state
from lightspan.datamodules.loading.workers import Dataset
from lightspan.datamodules.points.ldraw import LDrawFiles
from lightspan.datamodules.points.reading import BRICKS, read_shape
from lightspan.datamodules.points.shapes import Shape

VERSION = 1  # of what becomes of a file; another one packs anew
MOST_KEPT = 2**17
"""Points or triangles that are kept of a file."""
_ROW = 36 + 9  # bytes of a triangle
_BRICK = 2**17  # bytes of a part, whose own file says little of its size


def kept(shape: Shape) -> Shape:
    """A shape of at most `MOST_KEPT` points or triangles: of more, so many points, always the same."""
    return shape if len(shape.xyz) <= MOST_KEPT else shape.drawn(MOST_KEPT, np.random.default_rng(0))


@dataclass(frozen=True)
class _Read:
    """Shapes as a loader fetches them: each writes its own arrays, and gives what is known of it."""

    read: Callable[[int], Shape]
    count: int
    to: Annotated[Path, PathUse.CACHE]

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        try:
            shape = kept(self.read(index))
        except UserError:  # of this machine, not of the file
            raise
        except (ValueError, OSError, MemoryError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            return {"known": json.dumps({"damage": reason or str(error) or type(error).__name__})}
        digest = hashlib.sha256()
        for name, array in zip(Shape._fields, shape, strict=True):
            if array is not None:
                np.save(self.to / f"{index}-{name}.npy", array, allow_pickle=False)
                digest.update(array.tobytes())
        has = [name for name, array in zip(Shape._fields, shape, strict=True) if array is not None]
        return {"known": json.dumps({"has": has, "content": digest.hexdigest()})}


@dataclass(frozen=True)
class PackedShapes:
    """The shapes of one folder.

    Attributes:
        folder: of the pack.
        known: of each shape which arrays it `has`, and the sha256 of these, `content`; or its `damage`.
        labels: int64 [N].
    """

    folder: Annotated[Path, PathUse.READ]
    known: Sequence[Mapping[str, Any]]
    labels: np.ndarray

    def read(self, number: int) -> Shape:
        """Raises: KeyError for a damaged one."""
        has = self.known[number]["has"]
        return Shape(*(self._array(f"{number}-{name}.npy") if name in has else None for name in Shape._fields))  # type: ignore[arg-type]

    def _array(self, name: str) -> np.ndarray:
        # Mapped anew for each sample, which takes a tenth of a millisecond: a mapping holds its file open.
        return np.load(self.folder / name, mmap_mode="r", allow_pickle=False)


def arrays_in(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file of a pack by name."""
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


class PointCache:
    """Packs of shapes (`PackCache`), told apart by the files' names, sizes and times.

    Args:
        folder, limit_gib: as in `PackCache`.
    """

    def __init__(self, folder: CachePath | None, limit_gib: float) -> None:
        self.packs = PackCache(folder, "points", limit_gib)

    def packed(
        self, folder: Path, names: Sequence[str], labels: np.ndarray, roots: Sequence[Path], num_workers: int
    ) -> PackedShapes:
        """The pack of these files.

        Args:
            roots: where LDraw files find others.
        Raises: UserError if it would be larger than all packs may be; without the extra `points`.
        """
        states: list[list[Any]] = [[one_line(name), *file_state(folder / name)] for name in names]
        settings = [VERSION, NUMBERS.most, TRIANGLES.most, MOST_KEPT, [str(root) for root in roots]]
        key = hashlib.sha256(json.dumps([settings, states]).encode()).hexdigest()[:32]
        size = sum(_bytes(name, state[1]) for name, state in zip(names, states, strict=True))
        self.packs.require_room(size, f"the shapes of {len(names):,} files", "or name fewer files")
        return self.written(key, size, partial(_read_file, folder, names, LDrawFiles(roots)), labels, num_workers)

    def written(
        self, key: str, size: int, read: Callable[[int], Shape], labels: np.ndarray, num_workers: int
    ) -> PackedShapes:
        """The pack of this key, of what `read` gives for each number below that of the labels.

        Args:
            size: of the pack in bytes, about.
            read: raises ValueError or OSError for damage.
        """
        pack, about = self.packs.pack(key, size, partial(_write, read, len(labels), num_workers))
        return PackedShapes(pack, about["known"], labels)


def _read_file(folder: Path, names: Sequence[str], bricks: LDrawFiles, number: int) -> Shape:
    return read_shape(folder / names[number], bricks)


def _bytes(name: str, size: int) -> int:
    """Of what is kept of a file of this size, about: at most a triangle for each 12 bytes."""
    return _BRICK if name.lower().endswith(BRICKS) else min(MOST_KEPT, max(size, 0) // 12) * _ROW


def _write(read: Callable[[int], Shape], count: int, num_workers: int, to: Path) -> dict[str, Any]:
    return known_of(_Read(read, count, to), num_workers, "reading shapes")


def known_of(samples: Dataset, num_workers: int, title: str) -> dict[str, Any]:
    """What a pack is to know of samples that write themselves: each gives its own as JSON, `known`."""
    loader = EvaluationLoader(samples, 1, num_workers=num_workers)
    bar = track(loader, title, transient=True, disable=not sys.stdout.isatty())
    return {"known": [json.loads(text) for batch in bar for text in batch["known"]]}
