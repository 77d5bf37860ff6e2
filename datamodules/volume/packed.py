"""Volumes read once, in one orientation and spacing, into files that all ranks, workers and later runs map.

They are kept in half precision: in [0, 1] its steps are at most 0.0005, below the noise of scanners.
Shapes: C modalities, D H W voxels.
"""

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.progress import track

from lightspan.core.errors import one_line
from lightspan.core.files.foreign import NUMBERS
from lightspan.core.files.places import CachePath, PathUse
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.packs import PackCache, file_state
from lightspan.datamodules.volume.data import Volume
from lightspan.datamodules.volume.intensity import Intensity, finite
from lightspan.datamodules.volume.reading import VolumeFile, VoxelGrid
from lightspan.datamodules.volume.resampling import nearest, resampled, reshaped, respaced, trimmed
from lightspan.datamodules.volume.subjects import FoundSubjects, Subject, Unreadable, reading

VERSION = 1  # of what becomes of a volume; another one packs anew
MOST_LABEL = 2**15 - 1
FOREGROUND = 0.3
"""What is brighter belongs to the body, where intensities lie in [0, 1]: VoCo's threshold (its official code)."""
WHOLE = (slice(None),) * 3


@dataclass(frozen=True)
class VolumeDecoder:
    """What becomes of a subject's files.

    Args:
        spacing: in mm along D, H and W; None keeps that of the files.
        intensity: of each modality by itself.
        shape: voxels of the decoded volume along D, H and W, over the least box with all that is brighter than
            `FOREGROUND` in some modality, or over the whole volume if nothing is; None follows `spacing`.
    """

    spacing: tuple[float, float, float] | None
    intensity: Intensity
    shape: tuple[int, int, int] | None = None

    def grid(self, subject: Subject, folder: Path) -> VoxelGrid:
        """Of the decoded volume, from headers alone. Raises: as `Subject.grid`; Unreadable for too many voxels."""
        return self._new(subject, subject.grid(folder))

    def _new(self, subject: Subject, own: VoxelGrid) -> VoxelGrid:
        first = next(file for file in subject.files if file is not None)
        if self.shape is not None:
            return reading(first, reshaped, own, self.shape)
        return own if self.spacing is None else reading(first, respaced, own, self.spacing)

    def __call__(self, subject: Subject, folder: Path) -> tuple[np.ndarray, np.ndarray | None, VoxelGrid]:
        """(float16 [C D H W], 0 where a modality is missing; int16 [D H W] or None; the grid). Raises: Unreadable."""
        own = subject.grid(folder)
        box = WHOLE if self.shape is None else self._body(subject, folder)
        new = self._new(subject, trimmed(own, box))
        values = np.zeros((len(subject.files), *new.shape), np.float16)
        for channel, file in enumerate(subject.files):
            if file is not None:
                values[channel] = reading(file, self._channel, file, folder, box, new)
        labels = subject.segmentation
        return values, None if labels is None else reading(labels, _labels, labels, folder, box, new), new

    def _channel(self, file: VolumeFile, folder: Path, box: Sequence[slice], new: VoxelGrid) -> np.ndarray:
        scan, grid = file.read(folder)
        return self.intensity(resampled(finite(scan)[tuple(box)], trimmed(grid, box), new))

    def _body(self, subject: Subject, folder: Path) -> Sequence[slice]:
        files = (file for file in subject.files if file is not None)
        bright_DHW = reduce(np.logical_or, (reading(file, self._bright, file, folder) for file in files))
        if not bright_DHW.any():
            return WHOLE
        seen = [np.flatnonzero(bright_DHW.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
        return [slice(int(at[0]), int(at[-1]) + 1) for at in seen]

    def _bright(self, file: VolumeFile, folder: Path) -> np.ndarray:
        return self.intensity(finite(file.read(folder)[0])) > FOREGROUND


def _labels(file: VolumeFile, folder: Path, box: Sequence[slice], new: VoxelGrid) -> np.ndarray:
    values, grid = file.read(folder)
    whole = np.isfinite(values) & (np.rint(values) == values) & (values >= -1) & (values <= MOST_LABEL)
    if not whole.all():
        raise ValueError(
            f"it holds {float(values[~whole][0]):g}, and labels are whole numbers from -1 to {MOST_LABEL:,}"
        )
    return nearest(values[tuple(box)].astype(np.int16), trimmed(grid, box), new)


@dataclass(frozen=True)
class _Decoded:
    """The subjects of a folder as a loader fetches them: each writes its own files, and gives what is known of it."""

    found: FoundSubjects
    decode: VolumeDecoder
    to: Annotated[Path, PathUse.CACHE]

    def __len__(self) -> int:
        return len(self.found.subjects)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        subject = self.found.subjects[index]
        digest = hashlib.sha256()
        try:
            values, labels, grid = self.decode(subject, self.found.folder)
        except Unreadable as error:
            return {"known": json.dumps({"damage": [error.name, error.why]})}
        for name, array in ((f"{index}.npy", values), (f"{index}-labels.npy", labels)):
            if array is not None:
                np.save(self.to / name, array, allow_pickle=False)
                digest.update(array.tobytes())
        return {"known": json.dumps({"affine": grid.affine.tolist(), "content": digest.hexdigest()})}


@dataclass(frozen=True)
class PackedVolumes:
    """The subjects of one folder, decoded.

    Attributes:
        folder: of the pack.
        subjects: in their order.
        known: of each subject, its `affine` and the sha256 of its voxels, `content`; or its `damage`, the
            name of a file and what is wrong with it.
        labels: int64 [N].
        segmented: whether any subject of the data has a segmentation.
    """

    folder: Annotated[Path, PathUse.READ]
    subjects: Sequence[Subject]
    known: Sequence[Mapping[str, Any]]
    labels: np.ndarray
    segmented: bool

    def read(self, number: int) -> Volume:
        """Raises: KeyError for a damaged one."""
        subject, affine = self.subjects[number], np.array(self.known[number]["affine"])
        values, labels = self._array(f"{number}.npy"), None
        if subject.segmentation is not None:
            labels = self._array(f"{number}-labels.npy")
        elif self.segmented:
            labels = np.broadcast_to(np.int16(-1), values.shape[1:])
        present = np.array([file is not None for file in subject.files])
        return Volume(values, present, labels, affine, int(self.labels[number]))

    def _array(self, name: str) -> np.ndarray:
        # Mapped anew for each sample, which takes a tenth of a millisecond: a mapping holds its file open.
        return np.load(self.folder / name, mmap_mode="r", allow_pickle=False)


class VolumeCache:
    """Packs of decoded volumes (`PackCache`), told apart by the files' names, sizes and times and by the decoder.

    Args:
        folder, limit_gib: as in `PackCache`.
    """

    def __init__(self, folder: CachePath | None, limit_gib: float) -> None:
        self.packs = PackCache(folder, "volumes", limit_gib)

    def packed(
        self, found: FoundSubjects, labels: np.ndarray, segmented: bool, decode: VolumeDecoder, num_workers: int
    ) -> PackedVolumes:
        """The pack of these subjects. Raises: UserError if it would be larger than all packs may be."""
        size = sum(_bytes(subject, found.folder, decode) for subject in found.subjects)
        self.packs.require_room(
            size, f"the volumes of {len(found.subjects):,} subjects", "or raise data.init_args.spacing"
        )
        folder, about = self.packs.pack(_key(found, decode), size, partial(_write, found, decode, num_workers))
        return PackedVolumes(folder, found.subjects, about["known"], labels, segmented)


def _bytes(subject: Subject, folder: Path, decode: VolumeDecoder) -> int:
    try:
        voxels = math.prod(decode.grid(subject, folder).shape)
    except Unreadable:  # decoding says why
        return 0
    return 2 * voxels * (len(subject.files) + (subject.segmentation is not None))


def _write(found: FoundSubjects, decode: VolumeDecoder, num_workers: int, to: Path) -> dict[str, Any]:
    loader = EvaluationLoader(_Decoded(found, decode, to), 1, num_workers=num_workers)
    silent = not sys.stdout.isatty()
    known = [
        json.loads(text)
        for batch in track(loader, "reading volumes", transient=True, disable=silent)
        for text in batch["known"]
    ]
    return {"known": known, "folder": str(found.folder)}


def _key(found: FoundSubjects, decode: VolumeDecoder) -> str:
    settings = [VERSION, NUMBERS.most, decode.spacing, decode.shape, repr(decode.intensity)]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for subject in found.subjects:
        for file in (*subject.files, subject.segmentation):
            paths = [] if file is None else file.paths(found.folder)
            states = [[one_line(path.relative_to(found.folder)), *file_state(path)] for path in paths]
            digest.update(json.dumps(states).encode())
    return digest.hexdigest()[:32]
