"""Drawn rooms as grids of colour and opacity, with the class of each voxel: `lightspan.datamodules.rendered.rooms`.

Shapes: D H W voxels.
"""

from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.loading.found_sets import FoundSamples, KeptSamples
from lightspan.datamodules.loading.sample_sets import held_out_size
from lightspan.datamodules.rendered.draws import Draws
from lightspan.datamodules.rendered.rooms import METRES, RoomSpace
from lightspan.datamodules.volume.data import Volume, VolumeSets


def drawn_rooms(space: RoomSpace, draw_seed: int, numbers: np.ndarray, noise: float) -> list[Volume]:
    """The rooms with these numbers, each as large as it is: channels red, green, blue and alpha, all in [0, 1]; the
    segmentation is the class of each voxel, a place in `lightspan.datamodules.rendered.rooms.CLASSES`.

    Args:
        noise: standard deviation of what is added to colours and alpha, where bodies fill some of a voxel or of one
            beside it, as in a fitted field.
    """
    found = []
    affine = np.zeros((4, 4))
    affine[[2, 1, 0], [0, 1, 2]], affine[3, 3] = 1000 * METRES / space.side, 1
    for number in numbers:
        one = np.array([number])
        rooms = space.rooms(draw_seed, one)
        grids = space.grids(rooms)
        values = np.concatenate([grids.colour[0], grids.alpha])
        if noise:
            grain = np.float32(noise) * Draws(draw_seed, one, 33).normal(*values.shape)[0]
            near = grids.alpha[0] > 0
            for axis in range(3):
                near = near | np.roll(near, 1, axis) | np.roll(near, -1, axis)
            values = np.clip(values + grain * near, 0, 1)
        inside = tuple(slice(side) for side in grids.sides[0])
        label = int((rooms.kind >= 0).sum()) - space.fewest
        present, classes = np.ones(len(values), bool), grids.classes[0][inside].astype(np.int8)
        found.append(Volume(values[:, *inside].astype(np.float16), present, classes, affine, label))
    return found


class DrawnRooms(VolumeSets):
    """Rooms with boxes, spheres and cylinders as radiance fields have them: batches of `VolumeBatch` with channels red,
    green, blue and alpha, in [0, 1], and the class of each voxel. Rooms differ in size; `inside` says what pads
    them. The class of a volume is how many objects it has more than the fewest. All are kept in memory once drawn.

    Args:
        rooms: at least 2.
        side: voxels of the longest side that a room may have, at least 8.
        cells: of the floor along each side, of which each has one object at most.
        fewest, most: objects of a room, 0 <= fewest <= most <= cells^2 and 1 <= most.
        noise: standard deviation of what is added around surfaces, >= 0.
        draw_seed: of the rooms. `seed` is that of order and crops.
        val_size: rooms for validation, the last ones; None is a tenth.
        settings: those of `VolumeSets`.
    """

    tells_inside = True

    def __init__(
        self,
        rooms: int = 256,
        side: int = 32,
        cells: int = 2,
        fewest: int = 2,
        most: int = 4,
        noise: float = 0.02,
        draw_seed: int = 0,
        val_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.space = RoomSpace(side, cells, fewest, most)
        self.space.require()
        require_in("[0, inf)", noise=noise, draw_seed=draw_seed)
        val_size = held_out_size(val_size, rooms, rooms - 1)
        if rooms < 2 or not 1 <= val_size < rooms:
            raise UserError(f"DrawnRooms rooms={rooms} must be at least 2, and more than val_size={val_size} >= 1")
        require_numbers(rooms * max(side**3, cells**2), rooms=rooms, side=side, cells=cells)
        self.rooms, self.noise, self.draw_seed, self.val_size = rooms, noise, draw_seed, val_size

    def find(self) -> FoundSamples[Volume]:
        drawn = drawn_rooms(self.space, self.draw_seed, np.arange(self.rooms), self.noise)
        numbers, first = np.arange(self.rooms), self.rooms - self.val_size
        kinds = [f"{count} objects" for count in range(self.space.fewest, self.space.most + 1)]
        content = f"{self.space} {self.noise} {self.draw_seed} {first}"
        kept = KeptSamples(drawn, np.array([each.label for each in drawn]))
        return FoundSamples(kept, numbers[:first], numbers[first:], kinds, content)
