"""Drawn bodies as volumes, with the organ of each voxel: whole patients of `lightspan.datamodules.rendered.slices`.

Shapes: D H W voxels.
"""

from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.loading.found_sets import FoundSamples, KeptSamples
from lightspan.datamodules.loading.sample_sets import held_out_size
from lightspan.datamodules.rendered.slices import ANATOMY, KINDS, CutSlices, Ward
from lightspan.datamodules.volume.data import Volume, VolumeSets

ORGANS = ("outside", *ANATOMY)
"""What the numbers of a segmentation mean."""
HEIGHT_MM, WIDTH_MM = 480.0, 400.0  # of what a volume shows
_GREYS = np.array([0.0, *(tissue[0] for tissue in ANATOMY.values())], np.float32)


def _drawn(ward: Ward, contrasts: int, draw_seed: int, number: int) -> Volume:
    cut = ward.slices(draw_seed, number * ward.cuts + np.arange(ward.cuts))
    first_DHW = cut.images[:, 0] / np.float32(255)
    images = [first_DHW, *(_recoloured(first_DHW, cut, contrast) for contrast in range(1, contrasts))]
    # Slices are drawn from above, rows from the front and columns from the patient's right; here all three ascend.
    values, organs = (array[..., ::-1, ::-1, ::-1] for array in (np.stack(images), cut.organs))
    spacing = HEIGHT_MM / ward.cuts, WIDTH_MM / ward.side, WIDTH_MM / ward.side
    affine = np.zeros((4, 4))
    affine[[2, 1, 0], [0, 1, 2]], affine[3, 3] = spacing, 1
    present = np.ones(contrasts, bool)
    return Volume(values.astype(np.float16), present, organs.astype(np.int8), affine, int(cut.label.max()))


def _recoloured(first_DHW: np.ndarray, cut: CutSlices, contrast: int) -> np.ndarray:
    """The same body in another contrast: tissues exchange their greys, each with the one `contrast` places further on;
    vessels and grain keep their distance from them, and a lesion keeps it in every second contrast and is missing in
    the others.
    """
    greys = np.concatenate([_GREYS[:1], np.roll(_GREYS[1:], -contrast)])
    detail_DHW = first_DHW - _GREYS[cut.organs]
    if contrast % 2:
        detail_DHW = np.where(cut.lesion, 0, detail_DHW)
    return np.clip(greys[cut.organs] + detail_DHW, 0, 1)


class Phantoms(VolumeSets):
    """Trunks of `patients` as computed tomography shows them, intensities in [0, 1], with exact labels of twelve organs
    (`ORGANS`). The class of a volume is the kind of its lesion, 0 for none. All are kept in memory once drawn, at 1 +
    2 `contrasts` bytes a voxel.

    Args:
        patients: at least 2.
        cuts, side: D, and H and W, at least 8 each.
        diseased: share of patients with a lesion, in [0, 1].
        noise: standard deviation of the grain, >= 0, where white is 1.
        draw_seed: of the patients. `seed` is that of order and crops.
        val_size: patients for validation, the last ones; None is a tenth.
        contrasts: channels, at least 1: registered images of one body in which tissues have other greys, as sequences
            of magnetic resonance are; the second, fourth and so on do not show lesions.
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
        contrasts: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if min(cuts, side) < 8 or not 0 <= diseased <= 1 or not 0 <= noise < np.inf or draw_seed < 0:
            raise UserError(
                f"Phantoms cuts={cuts} and side={side} must be at least 8, diseased={diseased} lie in [0, 1], and "
                f"noise={noise} and draw_seed={draw_seed} be at least 0"
            )
        val_size = held_out_size(val_size, patients, patients - 1)
        if contrasts < 1:
            raise UserError(f"Phantoms contrasts={contrasts} must be at least 1")
        if patients < 2 or not 1 <= val_size < patients:
            raise UserError(f"Phantoms patients={patients} must be at least 2, and more than val_size={val_size} >= 1")
        numbers = patients * cuts * side**2 * (1 + contrasts)
        require_numbers(numbers, patients=patients, cuts=cuts, side=side, contrasts=contrasts)
        self.patients, self.val_size, self.draw_seed, self.contrasts = patients, val_size, draw_seed, contrasts
        self.ward = Ward(side, cuts, diseased, noise)

    def find(self) -> FoundSamples[Volume]:
        drawn = [_drawn(self.ward, self.contrasts, self.draw_seed, number) for number in range(self.patients)]
        numbers, first = np.arange(self.patients), self.patients - self.val_size
        content = f"{self.ward} {self.contrasts} {self.draw_seed} {first}"
        kept = KeptSamples(drawn, np.array([each.label for each in drawn]))
        return FoundSamples(kept, numbers[:first], numbers[first:], KINDS, content)
