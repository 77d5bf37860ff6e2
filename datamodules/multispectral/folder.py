"""A folder of the user's own TIFFs of many bands."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import PathUse, ReadPath
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.data import held_out
from lightspan.datamodules.image.picture_files import Kind, Labels, Links, find_labelled
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.multispectral.bands import Bands
from lightspan.datamodules.multispectral.data import FoundScenes, SpectralSets
from lightspan.datamodules.multispectral.resampling import square
from lightspan.datamodules.multispectral.tiffs import ENDINGS, read_tiff

SCENES = Kind("TIFF", "TIFF", ENDINGS)


@dataclass(frozen=True)
class Tiffs:
    """TIFFs of a folder as pictures of one size.

    Args:
        names: below the folder.
        labels: int64 [N].
        size: H = W; None leaves all as they are, which then must be of the size of the first.
        like: H and W of the first; empty where they are not compared.
        dates: as in `TiffFolder`.
    """

    folder: Annotated[Path, PathUse.READ]
    names: tuple[str, ...]
    labels: np.ndarray
    bands: Bands
    size: int | None
    like: list[int]
    dates: int | None

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Raises: UserError, naming the file, for one that cannot be read, or has other bands or another size."""
        path = self.folder / self.names[number]
        try:
            count = len(self.bands.stored_names)
            stored = read_tiff(path, count * (self.dates or 1))
            if self.dates is not None:
                stored = np.moveaxis(stored.reshape(self.dates, count, *stored.shape[1:]), 1, 0)
            values, valid = self.bands.reflectance(stored)
        except (ValueError, OSError) as error:
            raise UserError(f"{one_line(str(path))} cannot be used: {error}") from error
        if self.size is not None:
            made = square(torch.from_numpy(values), torch.from_numpy(valid), self.size)
            values, valid = (part.numpy() for part in made)
        elif self.like and [*values.shape[-2:]] != self.like:
            raise UserError(
                f"{one_line(str(path))} is of {' x '.join(map(str, values.shape[-2:]))} pixels, and others are of "
                f"{' x '.join(map(str, self.like))}; set data.init_args.size to one size for all"
            )
        return values, valid, int(self.labels[number])


class TiffFolder(SpectralSets):
    """TIFFs in a folder and its folders: batches of `MultispectralBatch`, with `dates` of `MultispectralSeriesBatch`.

    Files are read again whenever they are asked for.

    Args:
        folder: has the TIFFs (.tif and .tiff), of the bands `bands.stored`.
        bands: what they store and what of it is taken.
        size: height and width of a picture in pixels: the square in the middle, resampled. None leaves files as they
            are, which must all be of one size.
        labels, links: as in `lightspan.datamodules.image.picture_files.find_labelled`.
        val_share: share of each class held out for validation, in (0, 1), by a hash of the names.
        dates: of each TIFF, which has all bands of the first date, then of the second; 1 makes series of a single date
            of pictures, for methods that read series. None gives pictures without an axis of dates.
        settings: those of `SpectralSets`.
    Raises: UserError for settings out of range.
    """

    def __init__(
        self,
        folder: ReadPath,
        bands: Bands,
        size: int | None = None,
        labels: Labels = "auto",
        val_share: float = 0.1,
        dates: int | None = None,
        links: Links = "skip",
        **settings: Any,
    ) -> None:
        super().__init__(bands, **settings)
        if size is not None and size < 1:
            raise UserError(f"size={size} pixels is too small; it must be at least 1")
        if not 0 < val_share < 1:
            raise UserError(f"val_share={val_share} must be above 0 and below 1")
        if dates is not None and dates < 1:
            raise UserError(f"dates={dates} must be at least 1; leave it out for pictures without an axis of dates")
        require_numbers(len(bands) * (dates or 1) * (size or 1) ** 2, size=size, dates=dates)
        self.dates = dates
        self.folder = expanded(folder, "data.init_args.folder")
        self.size, self.labels, self.val_share, self.links = size, labels, val_share, links

    def find(self) -> FoundScenes:
        found = find_labelled(self.folder, SCENES, self.links, self.labels)
        for remark in found.remarks:
            say(f"{self.folder}: {remark}")
        names, labels = found.names, found.labels
        album = Tiffs(self.folder, tuple(names), labels, self.bands, self.size, [], self.dates)
        album = replace(album, like=[*album.read(0)[0].shape[-2:]])
        validates = held_out(names, labels, self.val_share)
        train, val = np.flatnonzero(~validates), np.flatnonzero(validates)
        sizes = [(self.folder / names[number]).stat().st_size for number in train]
        content = "\n".join(f"{names[number]} {size}" for number, size in zip(train, sizes, strict=True))
        digest = hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return FoundScenes(album, train, val, val, found.classes, digest)
