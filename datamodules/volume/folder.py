"""Any folder of volumes as a data module."""

from collections.abc import Sequence
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import CachePath, ReadPath
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.data import held_out
from lightspan.datamodules.image.picture_files import Links
from lightspan.datamodules.loading.damage import report_damage
from lightspan.datamodules.loading.found_sets import FoundSamples, KeptSamples
from lightspan.datamodules.loading.packs import JoinedPacks
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.volume.data import Volume, VolumeSamples, VolumeSets, along_axes
from lightspan.datamodules.volume.intensity import Intensity, Percentiles
from lightspan.datamodules.volume.packed import PackedVolumes, VolumeCache, VolumeDecoder
from lightspan.datamodules.volume.subjects import ALL, FoundSubjects, find_subjects


class VolumeFolder(VolumeSets):
    """The NIfTI files and DICOM series below a folder, of any orientation, spacing and size, with one or several
    registered modalities of each subject and, where there are some, labels of their voxels.

    Each volume is read once, turned to one orientation (`lightspan.datamodules.volume.reading`), resampled to `spacing`
    (labels by the nearest voxel), brought to one range, and kept in a cache on disk, from which all ranks and workers
    and later runs read.

    Args:
        folder: of the volumes.
        val_folder: subjects for validation; None holds out `val_share` of those of `folder`.
        modalities: name -> pattern, see `lightspan.datamodules.volume.subjects.find_subjects`: the channels, in this
            order. None reads each file as a subject of its own. A modality that a subject lacks is 0, and `present`
            says so.
        segmentation: pattern of the labels, whole numbers from -1 (none). A subject without a file has -1 everywhere.
        spacing: between voxels in mm, one number or those along D, H and W; None keeps that of the files, or with
            `bases` brings the box around each body to the size of the grid, so that a cell is at one place in all.
        intensity: of each volume by itself; None is `Percentiles`, for MR. For CT take an `IntensityWindow`.
        val_share: share of the subjects of each class held out, in (0, 1), by a hash of their names.
        links: "skip" or "follow".
        skip_damaged: True trains without subjects of which a file cannot be read and names them; False refuses to
            start.
        cache_dir: folder of the cache; None means ~/.cache/lightspan/volumes. A recipe may name one below
            ~/.cache/lightspan or `${run}`, a flag any.
        cache_gib: GiB that all cached volumes together may use.
        settings: those of `VolumeSets`.
    Raises: UserError before the first step: for no volume, damaged ones (all are named), patterns that nothing fits, a
        set larger than the cache, and without the extra `volumes`.
    """

    def __init__(
        self,
        folder: ReadPath,
        val_folder: ReadPath | None = None,
        modalities: dict[str, str] | None = None,
        segmentation: str | None = None,
        spacing: float | tuple[float, float, float] | None = None,
        intensity: Intensity | None = None,
        val_share: float = 0.1,
        links: Links = "skip",
        skip_damaged: bool = False,
        cache_dir: CachePath | None = None,
        cache_gib: float = 32,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not 0 < val_share < 1:
            raise UserError(f"val_share={val_share} must be above 0 and below 1")
        require_in("(0, inf)", spacing=spacing)
        self.folder = expanded(folder, "data.init_args.folder")
        self.val_folder = None if val_folder is None else expanded(val_folder, "data.init_args.val_folder")
        self.modalities, self.segmentation, self.val_share = modalities or ALL, segmentation, val_share
        self.links, self.skip_damaged = links, skip_damaged
        whole = None if self.bases is None else along_axes(tuple(map(mul, self.bases, self.size)))
        spacings = None if spacing is None else along_axes(spacing, "spacing")
        self.decode = VolumeDecoder(spacings, intensity or Percentiles(), whole if spacing is None else None)
        self.cache = VolumeCache(cache_dir, cache_gib)

    def find(self) -> FoundSamples[Volume]:
        sets = [self._subjects(folder) for folder in (self.folder, self.val_folder) if folder is not None]
        classes = sets[0].classes
        labels = [_labels(found, classes, sets[0].folder) for found in sets]
        segmented = self.segmentation is not None
        packs = [
            self.cache.packed(found, own, segmented, self.decode, self.num_workers)
            for found, own in zip(sets, labels, strict=True)
        ]
        sound = self._sound(sets, packs)
        joined = np.concatenate(labels)
        if self.val_folder is None:
            names = [subject.subject for subject in sets[0].subjects]
            train, val = _held_out(names, joined, sound[0], self.val_share)
        else:
            train, val = sound[0], len(sets[0].subjects) + sound[1]
        archive = JoinedPacks(packs, joined)
        called = [subject.name for found in sets for subject in found.subjects]
        return FoundSamples(archive, train, val, classes, archive.content(train), called)

    def blank(self) -> VolumeSamples | None:
        """Two subjects of zeros of the size of a crop, where the folder is not here."""
        if self.folder.exists():
            return None
        channels, nothing = len(self.modalities), np.zeros(self.size, np.float16)
        labels = None if self.segmentation is None else nothing.astype(np.int64)
        zeros = Volume(np.stack([nothing] * channels), np.ones(channels, bool), labels, np.eye(4), 0)
        return self.training(KeptSamples([zeros, zeros]), np.arange(2))

    def _subjects(self, folder: Path) -> FoundSubjects:
        found = find_subjects(folder, self.modalities, self.segmentation, self.links)
        for remark in found.remarks:
            say(f"{folder}: {remark}")
        lacking = [sum(subject.files[at] is None for subject in found.subjects) for at in range(len(self.modalities))]
        for name, count in zip(self.modalities, lacking, strict=True):
            if count:
                say(f"{folder}: {count:,} of {len(found.subjects):,} subjects have no {name}")
        return found

    def _sound(self, sets: Sequence[FoundSubjects], packs: Sequence[PackedVolumes]) -> list[np.ndarray]:
        """The numbers of the subjects of each folder that can be read."""
        damaged, sound = [], []
        for found, pack in zip(sets, packs, strict=True):
            wrong = [number for number, known in enumerate(pack.known) if "damage" in known]
            for name, why in (pack.known[number]["damage"] for number in wrong):
                damaged.append((found.folder / name, why))
            sound.append(np.delete(np.arange(len(found.subjects)), wrong))
        report_damage(damaged, sum(len(found.subjects) for found in sets), "subjects", self.skip_damaged)
        return sound


def _labels(found: FoundSubjects, classes: Sequence[str], training: Path) -> np.ndarray:
    """int64 [N]. Raises: UserError for a class that the training folder does not have."""
    if unknown := sorted({*found.classes} - {*classes}):
        raise UserError(
            f"{found.folder} has {one_line(unknown[0])}, which is no class of {training}; its classes are "
            f"{one_line(', '.join(classes)) or 'none'}"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers.get(subject.group, 0) for subject in found.subjects], np.int64)


def _held_out(
    names: Sequence[str], labels: np.ndarray, sound: np.ndarray, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation): all sessions of a subject are on one side."""
    firsts = {names[number]: number for number in sound[::-1].tolist()}
    subjects = sorted(firsts)
    chosen = held_out(subjects, labels[[firsts[name] for name in subjects]], share) if subjects else np.zeros(0, bool)
    validates = {name for name, taken in zip(subjects, chosen.tolist(), strict=True) if taken}
    inside = np.array([names[number] in validates for number in sound.tolist()], bool)
    return sound[~inside], sound[inside]
