"""Drawn bodies as volumes, with the organ of each voxel: whole patients of `lightspan.datamodules.rendered.slices`.

Shapes: D H W voxels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.datamodules.loading.sample_sets import held_out_size
from lightspan.datamodules.rendered.slices import ANATOMY, KINDS, Ward
from lightspan.datamodules.volume.data import FoundVolumes, Volume, VolumeSets

ORGANS = ("outside", *ANATOMY)
"""What the numbers of a segmentation mean."""
HEIGHT_MM, WIDTH_MM = 480.0, 400.0  # of what a volume shows


@dataclass(frozen=True)
class _Patients:
    """labels: of each patient, a place in `KINDS`, int64 [N]."""

    volumes: list[Volume]
    labels: np.ndarray

    def read(self, number: int) -> Volume:
        return self.volumes[number]


def _drawn(ward: Ward, draw_seed: int, number: int) -> Volume:
    cut = ward.slices(draw_seed, number * ward.cuts + np.arange(ward.cuts))
    # Slices are drawn from above, rows from the front and columns from the patient's right; here all three ascend.
    values, organs = (array[::-1, ::-1, ::-1] for array in (cut.images[:, 0], cut.organs))
    spacing = HEIGHT_MM / ward.cuts, WIDTH_MM / ward.side, WIDTH_MM / ward.side
    affine = np.zeros((4, 4))
    affine[[2, 1, 0], [0, 1, 2]], affine[3, 3] = spacing, 1
    scaled = (values / np.float32(255)).astype(np.float16)[None]
    return Volume(scaled, np.ones(1, bool), organs.astype(np.int8), affine, int(cut.label.max()))


class Phantoms(VolumeSets):
    """Trunks of `patients` as computed tomography shows them, intensities in [0, 1], with exact labels of twelve organs
    (`ORGANS`). The class of a volume is the kind of its lesion, 0 for none. All are kept in memory once drawn, at 3
    bytes a voxel.

    Args:
        patients: at least 2.
        cuts, side: D, and H and W, at least 8 each.
        diseased: share of patients with a lesion, in [0, 1].
        noise: standard deviation of the grain, >= 0, where white is 1.
        draw_seed: of the patients. `seed` is that of order and crops.
        val_size: patients for validation, the last ones; None is a tenth.
        settings: those of `VolumeSets`.
    """

    def __init__(
        self,
        patients: int = 64,
        cuts: int = 32,
        side: int = 48,
        diseased: float = 0.5,
        noise: float = 0.04,
        draw_seed: int = 0,
        val_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if min(cuts, side) < 8 or not 0 <= diseased <= 1 or not 0 <= noise < np.inf or draw_seed < 0:
            raise UserError(
                f"Phantoms cuts={cuts} and side={side} must be at least 8, diseased={diseased} lie in [0, 1], and "
                f"noise={noise} and draw_seed={draw_seed} be at least 0"
            )
        val_size = held_out_size(val_size, patients, patients - 1)
        if patients < 2 or not 1 <= val_size < patients:
            raise UserError(f"Phantoms patients={patients} must be at least 2, and more than val_size={val_size} >= 1")
        self.patients, self.val_size, self.draw_seed = patients, val_size, draw_seed
        self.ward = Ward(side, cuts, diseased, noise)

    def find(self) -> FoundVolumes:
        drawn = [_drawn(self.ward, self.draw_seed, number) for number in range(self.patients)]
        archive = _Patients(drawn, np.array([volume.label for volume in drawn], np.int64))
        numbers, first = np.arange(self.patients), self.patients - self.val_size
        return FoundVolumes(archive, numbers[:first], numbers[first:], KINDS, f"{self.ward} {self.draw_seed} {first}")
