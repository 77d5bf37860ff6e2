"""Drawn LiDAR sweeps of streets at two moments, with what moved and boxes around it.

Streets and what a sensor sees of them are `lightspan.datamodules.rendered.traffic`.
Shapes: N returns of all first sweeps, M of all next ones, K boxes of all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightspan.core.ranges import require_in
from lightspan.datamodules.loading.workers import Dataset
from lightspan.datamodules.points.batch import SweepsBatch
from lightspan.datamodules.rendered.data import DrawnSets
from lightspan.datamodules.rendered.traffic import HEADINGS, POLE, Lidar, Traffic


@dataclass(frozen=True)
class SweepSamples:
    """Samples of `SweepsBatch` with the numbers from `first` on, functions of (seed, number).

    Args:
        flow_noise: standard deviation of each coordinate of the flow, in metres, drawn once for each return.
    """

    traffic: Traffic
    lidar: Lidar
    flow_noise: float
    draw_seed: int
    first: int
    count: int

    batch_type = SweepsBatch

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        number = self.first + index
        street = self.traffic.street(self.lidar.height, self.draw_seed, number)
        seen, things = self.lidar.sweeps(street, self.draw_seed, number), street.things
        noise = np.random.default_rng([self.draw_seed, number, 78]).standard_normal(seen.flow.shape)
        boxes = np.flatnonzero(things.kind != POLE)
        fields = {
            "xyz": seen.xyz,
            "classes": np.where(seen.thing < 0, 0, np.append(things.kind, 0)[seen.thing]),
            "flow": seen.flow + self.flow_noise * noise,
            "again": seen.again,
            "next_xyz": seen.later,
            "box": things.box[boxes],
            "box_class": things.kind[boxes],
            "box_shift": things.shift[boxes],
        }
        whole = {name: torch.from_numpy(np.ascontiguousarray(field)) for name, field in fields.items()}
        given = {name: field.float() if field.is_floating_point() else field for name, field in whole.items()}
        return {**given, "label": street.heading, "index": index}


class DrawnSweeps(DrawnSets):
    """Streets with traffic, each seen by a LiDAR at two moments: batches of `SweepsBatch`, whose labels are where the
    traffic goes, `HEADINGS`, and whose classes are those of `lightspan.datamodules.rendered.traffic.KINDS`.

    The sensor's own motion is known exactly and taken out: both sweeps are in the axes of the first moment, and what
    stands has a flow of 0. Sweeps are drawn anew whenever they are asked for, which takes some milliseconds.

    Args:
        traffic: what there is on a street; None is the defaults.
        lidar: None is the defaults.
        flow_noise: standard deviation of the error of each coordinate of the flow, in metres, >= 0.
        size, val_size, test_size: streets of the sets.
        batch_size: streets of one optimiser step over all ranks.
        settings: the others of `DrawnSets`.
    """

    def __init__(
        self,
        traffic: Traffic | None = None,
        lidar: Lidar | None = None,
        flow_noise: float = 0.0,
        size: int = 400,
        val_size: int = 64,
        test_size: int = 64,
        batch_size: int = 8,
        **settings: Any,
    ) -> None:
        super().__init__(size, val_size, test_size, batch_size, **settings)
        require_in("[0, inf)", flow_noise=flow_noise)
        self.traffic, self.lidar, self.flow_noise = traffic or Traffic(), lidar or Lidar(), float(flow_noise)
        self.labelled = True

    @property
    def num_classes(self) -> int:
        return len(HEADINGS)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Where traffic goes."""
        return HEADINGS

    def _samples(self, first: int, count: int) -> SweepSamples:
        return SweepSamples(self.traffic, self.lidar, self.flow_noise, self.draw_seed, first, count)

    def sets(self) -> Callable[[int, int], Dataset]:
        return self._samples

    def blank(self) -> SweepSamples:
        return self._samples(0, 2)

    def described(self) -> str:
        return f"two sweeps of up to {self.lidar.beams * self.lidar.steps:,} returns"
