"""Any folder of recordings as a data module."""

from pathlib import Path
from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.audio.data import AudioData
from lightspan.datamodules.audio.sound import RECORDINGS
from lightspan.datamodules.image.data import held_out
from lightspan.datamodules.image.picture_files import Labels, Links, PictureFiles, find_labelled
from lightspan.datamodules.loading.ranks import say


class AudioFolder(AudioData):
    """The WAV, FLAC, OGG and MP3 files below a folder, of any rate, length and number of channels: batches of
    `AudioBatch`. Labels are the sub-folders, if there are at least two and each file is in one; otherwise all are 0.

    Args:
        folder: with or without a sub-folder for each class.
        val_folder: recordings for validation, with sub-folders of the same names, as for speakers who do not train;
            None holds out `val_share` of `folder`.
        val_share: share of each class held out, in (0, 1), by a hash of the files' names, see
            `lightspan.datamodules.image.data.held_out`.
        labels, links: as in `lightspan.datamodules.image.picture_files.find_labelled`.
        settings: those of `AudioData`.

    Attributes:
        labelled: whether recordings have labels, None before `setup`.
    Raises: UserError before the first step for no recording, damaged ones (all that are found are named), and classes
        of `val_folder` that `folder` does not have.
    """

    def __init__(
        self,
        folder: ReadPath,
        val_folder: ReadPath | None = None,
        val_share: float = 0.1,
        labels: Labels = "auto",
        links: Links = "skip",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not 0 < val_share < 1:
            raise UserError(f"val_share={val_share} must be above 0 and below 1")
        self.folder = expanded(folder, "data.init_args.folder")
        self.val_folder = None if val_folder is None else expanded(val_folder, "data.init_args.val_folder")
        self.val_share, self.labels, self.links = val_share, labels, links
        self.labelled: bool | None = None

    def find(self) -> tuple[list[Path], dict[str, np.ndarray], dict[str, np.ndarray]]:
        training = self._files(self.folder)
        self.classes = tuple(training.classes)
        self.labelled = bool(self.classes)
        files, labels = [training.folder / name for name in training.names], training.labels
        if self.val_folder is None:
            validates = held_out(training.names, labels, self.val_share)
            train, val = np.flatnonzero(~validates), np.flatnonzero(validates)
        else:
            found = self._files(self.val_folder).like(training)
            train, val = np.arange(len(files)), len(files) + np.arange(len(found.names))
            files += [found.folder / name for name in found.names]
            labels = np.concatenate([labels, found.labels])
        return files, {"label": labels}, {"train": train, "val": val, "test": val}

    def _files(self, folder: Path) -> PictureFiles:
        files = find_labelled(folder, RECORDINGS, self.links, self.labels)
        for remark in files.remarks:
            say(f"{folder}: {remark}")
        return files
