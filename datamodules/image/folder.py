"""Any folder of pictures as a data module."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import CachePath, ReadPath
from lightspan.datamodules.image.data import Found, PictureData, held_out
from lightspan.datamodules.image.packed import Decoder, Fit, PackedPictures, PictureCache
from lightspan.datamodules.image.picture_files import Labels, Links, PictureFiles, find_pictures
from lightspan.datamodules.loading.packs import report_damage
from lightspan.datamodules.loading.ranks import say


@dataclass(frozen=True)
class _Folders:
    """The pictures of one or two folders, one after the other, decoded. labels: int64 [N]."""

    packs: Sequence[PackedPictures]
    firsts: Sequence[int]  # number of each pack's first picture
    labels: np.ndarray

    def read(self, number: int) -> tuple[np.ndarray, int]:
        at = int(np.searchsorted(self.firsts, number, side="right")) - 1
        return self.packs[at][number - self.firsts[at]], int(self.labels[number])


class ImageFolder(PictureData):
    """The JPEG, PNG, WebP, BMP, GIF and TIFF files below a folder, of any size, colours and depth.

    Each picture is decoded once, turned upright as EXIF says, made RGB and `size` x `size`, and kept in a cache on
    disk, from which all ranks and workers and later runs read (`PictureCache`). What becomes of grey, 16-bit, palette
    and CMYK files, `lightspan.datamodules.shards.decoders.decode_image` says.

    Args:
        folder: with or without a sub-folder for each class.
        val_folder: pictures for validation, with sub-folders of the same names; None holds out `val_share` of `folder`.
        labels: "auto", "folders" or "none", as in `find_pictures`.
        links: "skip" or "follow".
        fit: "crop" scales the shorter side and cuts out the middle, "pad" puts `background` around the whole.
        background: grey in [0, 255] behind what is transparent, and around what is padded.
        skip_damaged: True trains without files that cannot be decoded and names them; False refuses to start.
        cache_dir: folder of the cache; None means ~/.cache/lightspan/pictures. A recipe may name one below
            ~/.cache/lightspan or `${run}`, a flag any.
        cache_gib: GiB that all cached pictures together may use.
        settings: those of `PictureData`.

    Raises: UserError before the first step: for no picture, damaged ones (all are named), a set larger than the cache.
    """

    def __init__(
        self,
        folder: ReadPath,
        val_folder: ReadPath | None = None,
        labels: Labels = "auto",
        links: Links = "skip",
        fit: Fit = "crop",
        background: int = 255,
        skip_damaged: bool = False,
        cache_dir: CachePath | None = None,
        cache_gib: float = 32,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not 0 <= background <= 255:
            raise UserError(f"background={background} is not a grey in [0, 255]")
        self.folder = expanded(folder, "data.init_args.folder")
        self.val_folder = None if val_folder is None else expanded(val_folder, "data.init_args.val_folder")
        self.labels, self.links, self.skip_damaged = labels, links, skip_damaged
        self.decode = Decoder(self.size, fit, background)
        self.cache = PictureCache(cache_dir, cache_gib)

    def find(self) -> Found:
        training = self._files(self.folder)
        sets = [training]
        if self.val_folder is not None:
            sets.append(self._files(self.val_folder).like(training))
        packs = [self.cache.packed(files, self.decode, self.num_workers) for files in sets]
        self._report_damage(sets, packs)
        firsts = [0, len(training.names)][: len(sets)]
        sound = [
            first + np.delete(np.arange(len(files.names)), sorted(pack.damage))
            for first, files, pack in zip(firsts, sets, packs, strict=True)
        ]
        labels = np.concatenate([files.labels for files in sets])
        if self.val_folder is None:
            names = [training.names[number] for number in sound[0]]
            validates = held_out(names, labels[sound[0]], self.val_share)
            train, val = sound[0][~validates], sound[0][validates]
        else:
            train, val = sound
        digest = hashlib.sha256(packs[0].content.encode() + labels[train].tobytes() + train.tobytes())
        return Found(
            _Folders(packs, firsts, labels),
            train,
            val,
            bool(training.classes),
            training.classes,
            digest.hexdigest()[:32],
        )

    def _files(self, folder: Path) -> PictureFiles:
        files = find_pictures(folder, self.links, self.labels)
        for remark in files.remarks:
            say(f"{folder}: {remark}")
        return files

    def _report_damage(self, sets: Sequence[PictureFiles], packs: Sequence[PackedPictures]) -> None:
        damaged = [
            f"{one_line(files.folder / files.names[number])}: {one_line(why)}"
            for files, pack in zip(sets, packs, strict=True)
            for number, why in pack.damage.items()
        ]
        report_damage(damaged, sum(len(files.names) for files in sets), "pictures", self.skip_damaged)
