"""Folders of .npz files, each of which is a sample, in two parts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.files.places import PathUse
from lightspan.datamodules.image.data import held_out
from lightspan.datamodules.loading.packs import file_state


@dataclass(frozen=True)
class ArrayFiles:
    """files: all of them. train, val: the numbers of those that train and validate, int64, ascending."""

    files: Annotated[Sequence[Path], PathUse.READ]
    train: np.ndarray
    val: np.ndarray

    def content(self, settings: object) -> str:
        """What identifies the training samples: names, sizes and times of their files, and how they are read."""
        known = [(self.files[number].name, *file_state(self.files[number])) for number in self.train.tolist()]
        return hashlib.sha256(repr((settings, known)).encode()).hexdigest()[:32]


def array_files(folder: Path, val_folder: Path | None, val_share: float, sample: str) -> ArrayFiles:
    """Those of the folders themselves, by name.

    Args:
        val_folder: None holds out `val_share` of the first folder's files, by a hash of their names.
        sample: what a file holds, for the message, such as "scene, with an array rgbsigma".
    Raises: UserError for a folder that is not there, or has none.
    """
    sets = [_files(each, sample) for each in (folder, val_folder) if each is not None]
    files = [file for found in sets for file in found]
    validates = np.arange(len(files)) >= len(sets[0])
    if val_folder is None:
        validates = held_out([file.name for file in files], np.zeros(len(files), np.int64), val_share)
    return ArrayFiles(files, np.flatnonzero(~validates), np.flatnonzero(validates))


def _files(folder: Path, sample: str) -> list[Path]:
    found = sorted(file for file in folder.glob("*.npz") if file.is_file()) if folder.is_dir() else []
    if not found:
        raise UserError(
            f"{folder} {'has no .npz files' if folder.is_dir() else 'is no folder'}; name one with a file for each "
            f"{sample}"
        )
    return found
