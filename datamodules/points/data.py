"""What data modules of point clouds share: points drawn from shapes, their augmentation, the loaders.

Shapes: N clouds, three coordinates.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.loading.found_sets import Archive, ArchiveSamples, FoundSets, KeptSamples
from lightspan.datamodules.loading.on_device import finish_on_device
from lightspan.datamodules.points.augment import ChangedPoints, PointAugmentation, bits, unit_sphere
from lightspan.datamodules.points.batch import PointsBatch
from lightspan.datamodules.points.shapes import Shape

PointField = Literal["colour", "normal"]


@dataclass(frozen=True)
class PointSamples(ArchiveSamples[Shape]):
    """Samples of `PointsBatch`: a function of number and seed.

    Args:
        points: drawn from each shape, at most.
        fields: what is given besides coordinates. A point without colour is mid-grey, one without a normal has 0.
        normalise: to the unit sphere, see `lightspan.datamodules.points.augment.unit_sphere`.
        random: whether other points are drawn in each epoch; without, a shape always gives the same.
        augment: what is drawn for each cloud, and made on the device.
    """

    points: int
    fields: tuple[PointField, ...] = ()
    normalise: bool = True
    random: bool = False
    augment: PointAugmentation | None = None

    batch_type = PointsBatch

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        number = int(self.numbers[index])
        generator = np.random.default_rng([seed, 1] if self.random else [number, 0])
        drawn = self.archive.read(number).drawn(self.points, generator)
        xyz_N3 = torch.from_numpy(np.array(drawn.xyz, np.float32))
        if self.normalise:
            xyz_N3 = unit_sphere(xyz_N3, torch.tensor([0, len(xyz_N3)]))
        given: dict[str, Any] = {"xyz": xyz_N3} | {name: _field(drawn, name) for name in self.fields}
        if self.augment is not None:
            given |= {"drawn": bits(self.augment.draw(generator)), "seed": torch.tensor(seed)}
        return {**given, "label": int(self.archive.labels[number]), "index": index}


def _field(drawn: Shape, name: PointField) -> Tensor:
    if name == "colour":
        return (
            torch.full(drawn.xyz.shape, 0.5) if drawn.colour is None else torch.tensor(drawn.colour / np.float32(255))
        )
    return torch.zeros(drawn.xyz.shape) if drawn.normal is None else torch.tensor(drawn.normal, dtype=torch.float32)


class PointSets(FoundSets[Shape]):
    """Point clouds of any number of points, packed: batches of `PointsBatch`. A subclass finds the shapes.

    Points are drawn from a surface evenly by area, and from a cloud without repetition, all of them if there are no
    more. In training the draw and the augmentation are functions of (seed, epoch, sample), so that any number of ranks
    and workers and a run that resumes see the same; elsewhere a shape always gives the same points.

    Args:
        points: drawn from each shape, at most.
        fields: what a batch has besides coordinates: "colour" (mid-grey where a file has none), "normal" (of a surface
            at right angles to it, to either side; 0 where there is none).
        normalise: moves each cloud to its mean and scales it into the unit sphere. Without, coordinates are in the
            unit of the file, from the middle of the box around its shape.
        batch_size: clouds of one optimiser step over all ranks.
        augment: of training clouds, after `normalise`, made on the device; None leaves them as they are.
        seed: of the order, the draws and the augmentation.
        num_workers: processes that fetch batches.
        selection: as in `lightspan.datamodules.loading.sample_sets.SampleSets`.

    """

    called = "clouds"

    def __init__(
        self,
        points: int = 1024,
        fields: tuple[PointField, ...] = (),
        normalise: bool = True,
        batch_size: int = 32,
        augment: PointAugmentation | None = None,
        seed: int = 0,
        num_workers: int = 0,
        selection: ReadPath | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, selection)
        require_in("[1, inf)", points=points)
        if len({*fields}) < len(fields):
            raise UserError(f"fields={list(fields)} names one twice")
        require_numbers(3 * (1 + len(fields)) * points, points=points)
        self.points, self.fields, self.normalise, self.augment = points, tuple(fields), normalise, augment
        self.train: PointSamples | None = None
        if augment is not None:
            finish_on_device(self, ChangedPoints(augment))

    def training(self, archive: Archive[Shape], numbers: np.ndarray) -> PointSamples:
        return PointSamples(archive, numbers, self.points, self.fields, self.normalise, True, self.augment)

    def unchanging(self, archive: Archive[Shape], numbers: np.ndarray) -> PointSamples:
        return PointSamples(archive, numbers, self.points, self.fields, self.normalise)

    def described(self) -> str:
        return f"of up to {self.points:,} points"

    def blank_samples(self) -> PointSamples:
        """Two training samples of a surface, for plans where the data are not here."""
        triangle = Shape(np.eye(3, dtype=np.float32)[None])
        return self.training(KeptSamples([triangle, triangle]), np.arange(2))
