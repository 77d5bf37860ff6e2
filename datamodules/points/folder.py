"""Any folder of point clouds and surfaces as a data module."""

from pathlib import Path
from typing import Any

import numpy as np

from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import CachePath, ReadPath
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.data import held_out
from lightspan.datamodules.image.picture_files import Labels, Links, PictureFiles, find_labelled
from lightspan.datamodules.loading.damage import report_damage
from lightspan.datamodules.loading.found_sets import FoundSamples
from lightspan.datamodules.loading.packs import JoinedPacks
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.points.data import PointSamples, PointSets
from lightspan.datamodules.points.ldraw import library_roots
from lightspan.datamodules.points.packed import PointCache
from lightspan.datamodules.points.reading import POINTS
from lightspan.datamodules.points.shapes import Shape


class PointFolder(PointSets):
    """The PLY, OBJ, STL, OFF, LAS, LAZ and LDraw files below a folder, each of which is a sample.

    Each file is read once and kept in a cache on disk, from which all ranks and workers and later runs read: as a
    surface if it has faces, else as points. Of more than 131,072 triangles or points, so many points are kept. Points
    with coordinates that are not finite, or beyond 1e12, are left out.

    Args:
        folder: with or without a sub-folder for each class.
        val_folder: files for validation, with sub-folders of the same names; None holds out `val_share`.
        val_share: share of the files of each class held out, in (0, 1), by a hash of their names.
        labels, links: as in `lightspan.datamodules.image.picture_files.find_labelled`.
        skip_damaged: True trains without files that cannot be read and names them; False refuses to start.
        cache_dir: folder of the cache; None means ~/.cache/lightspan/points. A recipe may name one below
            ~/.cache/lightspan or `${run}`, a flag any.
        cache_gib: GiB that all cached shapes together may use.
        settings: those of `PointSets`.
    Raises: UserError before the first step: for no file, damaged ones (all are named), a set larger than the cache, and
        without the extra `points`.
    """

    def __init__(
        self,
        folder: ReadPath,
        val_folder: ReadPath | None = None,
        val_share: float = 0.1,
        labels: Labels = "auto",
        links: Links = "skip",
        skip_damaged: bool = False,
        cache_dir: CachePath | None = None,
        cache_gib: float = 32,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        require_in("(0, 1)", val_share=val_share)
        self.folder = expanded(folder, "data.init_args.folder")
        self.val_folder = None if val_folder is None else expanded(val_folder, "data.init_args.val_folder")
        self.val_share, self.labels, self.links, self.skip_damaged = val_share, labels, links, skip_damaged
        self.cache = PointCache(cache_dir, cache_gib)

    def blank(self) -> PointSamples | None:
        """Two samples of a triangle, where the folder is not here."""
        return None if self.folder.exists() else self.blank_samples()

    def find(self) -> FoundSamples[Shape]:
        training = self._found(self.folder)
        sets = [training] if self.val_folder is None else [training, self._found(self.val_folder).like(training)]
        packs = [
            self.cache.packed(found.folder, found.names, found.labels, library_roots(found.folder), self.num_workers)
            for found in sets
        ]
        damage, sound = [], []
        for found, pack in zip(sets, packs, strict=True):
            wrong = [number for number, known in enumerate(pack.known) if "damage" in known]
            damage += [(found.folder / found.names[number], pack.known[number]["damage"]) for number in wrong]
            sound.append(np.delete(np.arange(len(found.names)), wrong))
        report_damage(damage, sum(len(found.names) for found in sets), "files", self.skip_damaged)
        if self.val_folder is None:
            inside = self.validating([training.names[at] for at in sound[0]], training.labels[sound[0]])
            train, val = sound[0][~inside], sound[0][inside]
        else:
            train, val = sound[0], len(training.names) + sound[1]
        joined = JoinedPacks(packs, np.concatenate([found.labels for found in sets]))
        return FoundSamples(joined, train, val, training.classes, joined.content(train))

    def validating(self, names: list[str], labels: np.ndarray) -> np.ndarray:
        """Which files of a folder without another one beside it are for validation, bool [N].

        Args:
            names: below the folder, with `/` between its parts.
            labels: int64 [N].
        """
        return held_out(names, labels, self.val_share)

    def _found(self, folder: Path) -> PictureFiles:
        files = find_labelled(folder, POINTS, self.links, self.labels)
        for remark in files.remarks:
            say(f"{folder}: {remark}")
        return files
