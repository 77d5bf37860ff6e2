"""Changes of point clouds, made on the device from numbers that the workers drew: a crop, turns, scaling, a shift,
jitter, in this order.

Each function takes packed points and the offsets that cut them, and needs no loop over the clouds.
Shapes: N points of all clouds, B clouds, P parameters of a change.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightspan.core.noise import hashed_noise, mixed_seed
from lightspan.core.ragged import kept_offsets, ragged_maxima, ragged_means, ragged_ranks, row_owners
from lightspan.core.ranges import require_in

T = TypeVar("T")


class Change(NamedTuple, Generic[T]):
    """How a cloud is changed.

    Attributes:
        keep: share of the points that stay: those farthest along `side`.
        side_x, side_y, side_z: of unit length.
        turn_x, turn_y, turn_z: degrees about the axes, first about x, anticlockwise as seen from its end.
        scale_x, scale_y, scale_z: factors of the coordinates.
        shift_x, shift_y, shift_z: added to them.
    """

    keep: T
    side_x: T
    side_y: T
    side_z: T
    turn_x: T
    turn_y: T
    turn_z: T
    scale_x: T
    scale_y: T
    scale_z: T
    shift_x: T
    shift_y: T
    shift_z: T


def cropped(xyz_N3: Tensor, offsets: Tensor, side_B3: Tensor, keep_B: Tensor) -> Tensor:
    """Which points stay, bool [N]: of a cloud of n the n `keep`, rounded up, that are farthest along a direction; at
    least one. Of equally far ones the first stay.
    """
    cloud_N = row_owners(offsets, len(xyz_N3))
    along_N = (xyz_N3 * side_B3[cloud_N]).sum(dim=1)
    rank_N = ragged_ranks(-along_N, offsets)
    counts_B = offsets.diff()
    return rank_N < (counts_B * keep_B.double() - 1e-6).ceil().long().clamp_min(1)[cloud_N]


def turned(xyz_N3: Tensor, offsets: Tensor, degrees_B3: Tensor) -> Tensor:
    """Turned about the origin by angles about x, then y, then z: [N 3]."""
    cos_B3, sin_B3 = degrees_B3.deg2rad().cos(), degrees_B3.deg2rad().sin()
    whole_B33 = torch.eye(3, device=xyz_N3.device, dtype=xyz_N3.dtype).expand(len(degrees_B3), 3, 3)
    for axis, (first, second) in enumerate(((1, 2), (2, 0), (0, 1))):
        turn_B33 = torch.eye(3, device=xyz_N3.device, dtype=xyz_N3.dtype).repeat(len(degrees_B3), 1, 1)
        turn_B33[:, first, first] = turn_B33[:, second, second] = cos_B3[:, axis].to(xyz_N3.dtype)
        turn_B33[:, first, second], turn_B33[:, second, first] = -sin_B3[:, axis], sin_B3[:, axis]
        whole_B33 = turn_B33 @ whole_B33
    return (whole_B33[row_owners(offsets, len(xyz_N3))] @ xyz_N3[..., None])[..., 0]


def scaled(xyz_N3: Tensor, offsets: Tensor, factor_B3: Tensor) -> Tensor:
    """Times a factor for each axis: [N 3]."""
    return xyz_N3 * factor_B3[row_owners(offsets, len(xyz_N3))]


def shifted(xyz_N3: Tensor, offsets: Tensor, shift_B3: Tensor) -> Tensor:
    return xyz_N3 + shift_B3[row_owners(offsets, len(xyz_N3))]


def jittered(xyz_N3: Tensor, offsets: Tensor, seed_B: Tensor, deviation: float, most: float) -> Tensor:
    """With normal noise on each coordinate, a function of the cloud's seed and the point's place in it: [N 3].

    Args:
        seed_B: int64.
        deviation: of the noise, in the unit of the coordinates. most: beyond which it is cut off.
    """
    cloud_N = row_owners(offsets, len(xyz_N3))
    place_N = torch.arange(len(xyz_N3), device=xyz_N3.device) - offsets[cloud_N]
    noise_N3 = hashed_noise(mixed_seed(seed_B, 1)[cloud_N] + place_N, 0, (3,))
    return xyz_N3 + (deviation * noise_N3).clamp(-most, most).to(xyz_N3.dtype)


def unit_sphere(xyz_N3: Tensor, offsets: Tensor) -> Tensor:
    """Each cloud about its mean, the farthest point at a distance of 1: [N 3]; equal points are all 0."""
    cloud_N = row_owners(offsets, len(xyz_N3))
    centred_N3 = xyz_N3 - ragged_means(xyz_N3, offsets)[cloud_N]
    # By the largest coordinate first: squares of very large or small ones leave the range of numbers.
    size_B1 = ragged_maxima(centred_N3.abs().amax(dim=1, keepdim=True), offsets)
    centred_N3 = centred_N3 / size_B1.clamp_min(torch.finfo(xyz_N3.dtype).tiny)[cloud_N]
    radius_B1 = ragged_maxima(centred_N3.norm(dim=1, keepdim=True), offsets)
    return centred_N3 / radius_B1.clamp_min(1)[cloud_N]


@dataclass(frozen=True)
class PointAugmentation:
    """What may be drawn of a `Change`, and jitter. By default nothing changes.

    Args:
        keep: least share of the points that a crop leaves, in (0, 1]; shares are uniform in [keep, 1], and the
            direction in which points stay is any.
        degrees: angles about x, y and z are uniform in [-d, d] each, in [0, 180]; [0, 0, 180] is any turn about the
            vertical.
        scale: factors along each axis are uniform between these, each above 0.
        same_scale: one factor for all axes, which keeps the shape.
        shift: uniform in [-shift, shift] along each axis, >= 0.
        jitter: deviation of the noise on each coordinate, >= 0.
        most_jitter: beyond which noise is cut off, >= 0.
    Raises: UserError for settings outside of these.
    """

    keep: float = 1.0
    degrees: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: tuple[float, float] = (1.0, 1.0)
    same_scale: bool = False
    shift: float = 0.0
    jitter: float = 0.0
    most_jitter: float = 0.05

    def __post_init__(self) -> None:
        require_in("(0, 1]", keep=self.keep)
        require_in("[0, 180]", degrees=self.degrees)
        require_in("(0, inf)", scale=self.scale)
        require_in("[0, inf)", shift=self.shift, jitter=self.jitter, most_jitter=self.most_jitter)

    def draw(self, generator: np.random.Generator) -> Change[float]:
        """All that is random but the noise, which follows from the sample's seed."""
        side_3 = generator.normal(size=3)
        side_3 /= max(float(np.linalg.norm(side_3)), 1e-300)
        factors_3 = generator.uniform(*self.scale, size=3)
        return Change._make(
            [
                float(generator.uniform(self.keep, 1)),
                *side_3.tolist(),
                *(float(generator.uniform(-width, width)) for width in self.degrees),
                *(factors_3[[0, 0, 0]] if self.same_scale else factors_3).tolist(),
                *generator.uniform(-self.shift, self.shift, size=3).tolist(),
            ]
        )


@dataclass(frozen=True)
class ChangedPoints:
    """Makes of a batch with numbers `drawn`, int32 [B P], one whose clouds are changed and whose `parameters` say how,
    float32 [B P].
    """

    augmentation: PointAugmentation

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in batch.items() if name not in ("drawn", "seed")}
        parameters_BP, offsets = batch["drawn"].view(torch.float32), batch["offsets"]
        columns = Change(*parameters_BP.unbind(1))
        side_B3, turn_B3, scale_B3, shift_B3 = (torch.stack(columns[at : at + 3], dim=1) for at in (1, 4, 7, 10))
        packed = {name: batch[name].float() for name in ("xyz", "colour", "normal") if name in batch}
        if self.augmentation.keep < 1:
            kept_N = cropped(packed["xyz"], offsets, side_B3, columns.keep)
            offsets = kept_offsets(kept_N, offsets)
            packed = {name: rows[kept_N] for name, rows in packed.items()}
            if "classes" in batch:
                packed["classes"] = batch["classes"][kept_N]
        if any(self.augmentation.degrees):
            for name in packed.keys() & {"xyz", "normal"}:
                packed[name] = turned(packed[name], offsets, turn_B3)
        xyz_N3 = shifted(scaled(packed["xyz"], offsets, scale_B3), offsets, shift_B3)
        if "normal" in packed:  # what is at right angles to a surface stays so
            bent_N3 = scaled(packed["normal"], offsets, 1 / scale_B3)
            packed["normal"] = torch.nn.functional.normalize(bent_N3, dim=1)
        if self.augmentation.jitter:
            noise = self.augmentation.jitter, self.augmentation.most_jitter
            xyz_N3 = jittered(xyz_N3, offsets, batch["seed"], *noise)
        return {**rest, **packed, "xyz": xyz_N3, "offsets": offsets, "parameters": parameters_BP}


def bits(change: Change[float]) -> Tensor:
    """int32 [P]: whole numbers, because mixed or low precision rounds all others before they are on the device."""
    return torch.tensor(change, dtype=torch.float32).view(torch.int32)
