"""Random alterations of volumes: drawn one sample at a time as a function of its seed, and made of whole batches where
the model is.

All that moves voxels is one map, so that a volume is interpolated once, and its labels take the nearest voxel.
Shapes: B samples, C channels, D H W voxels, V crops, P parameters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.core.noise import hashed_noise, mixed_seed
from lightspan.core.ranges import require_in

T = TypeVar("T")
NO_LABEL = -1  # of a voxel from outside of the volume
BIAS, NOISE = 1, 2
"""What is mixed into a sample's seed, which is that of its elastic displacements."""


class Alteration(NamedTuple, Generic[T]):
    """How a crop was altered, in the order of the steps. In brackets: what leaves it as it is.

    bend: standard deviation of the elastic displacement at its control points, in voxels [0].
    shift_d, shift_h, shift_w: in voxels [0].
    angle_d, angle_h, angle_w: degrees of turning about each axis, in millimetres [0].
    zoom: factor of size [1].
    turns: quarter turns from H to W, as `torch.rot90` counts them [0].
    flip_d, flip_h, flip_w: 1 if the axis is reversed [0].
    thick_d, thick_h, thick_w: how many voxels along an axis become one, between which it is linear again [1].
    bias: standard deviation of the logarithm of the factor of the bias field at its control points [0].
    gain, offset, gamma: an intensity x becomes gain * sign(x) |x|^gamma + offset [1, 0, 1].
    noise: standard deviation of what is added to each voxel [0].
    """

    bend: T
    shift_d: T
    shift_h: T
    shift_w: T
    angle_d: T
    angle_h: T
    angle_w: T
    zoom: T
    turns: T
    flip_d: T
    flip_h: T
    flip_w: T
    thick_d: T
    thick_h: T
    thick_w: T
    bias: T
    gain: T
    offset: T
    gamma: T
    noise: T


@dataclass(frozen=True)
class VolumeAugmentation:
    """What may be drawn of an `Alteration`. By default nothing changes.

    Args:
        flip: probability of reversing D, H and W each, in [0, 1]; the last exchanges left and right.
        turn: probability of one to three quarter turns in the plane of H and W, in [0, 1]; their sides must be equal.
        degrees: angles about each axis are uniform in [-degrees, degrees], in [0, 180].
        scale: of size, x in [0, 1): a factor between 1 - x and 1 + x.
        shift: uniform in [-shift, shift] voxels along each axis, >= 0.
        elastic: the largest `bend`, in voxels, >= 0; it is uniform in [0, elastic].
        points: control points of the elastic displacement and of the bias field along each axis, >= 2, between which
            they are linear.
        anisotropy: the largest `thick`, of one axis that is drawn too, >= 1; it is uniform in [1, anisotropy].
        bias: the largest `bias`, >= 0; it is uniform in [0, bias].
        gain, gamma: x in [0, 1): a factor, and an exponent, between 1 - x and 1 + x.
        offset: uniform in [-offset, offset], >= 0.
        noise: the largest `noise`, >= 0; it is uniform in [0, noise].
    Raises: UserError for settings outside of these.
    """

    flip: tuple[float, float, float] = (0.0, 0.0, 0.0)
    turn: float = 0.0
    degrees: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    elastic: float = 0.0
    points: int = 5
    anisotropy: float = 1.0
    bias: float = 0.0
    gain: float = 0.0
    offset: float = 0.0
    gamma: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        require_in("[0, 1]", flip=self.flip, turn=self.turn)
        require_in("[0, 180]", degrees=self.degrees)
        require_in("[0, 1)", scale=self.scale, gain=self.gain, gamma=self.gamma)
        require_in("[0, inf)", shift=self.shift, elastic=self.elastic, offset=self.offset)
        require_in("[0, inf)", bias=self.bias, noise=self.noise)
        require_in("[1, inf)", anisotropy=self.anisotropy)
        require_in("[2, inf)", points=self.points)

    @property
    def moves(self) -> bool:
        """Whether a voxel may move."""
        return any((*self.flip, self.turn, self.degrees, self.scale, self.shift, self.elastic))

    def require_size(self, size: tuple[int, int, int]) -> None:
        """Raises: UserError for quarter turns of crops [D H W] that are no squares."""
        if self.turn and size[1] != size[2]:
            raise UserError(
                f"augment.turn={self.turn} turns squares, and crops are {' x '.join(map(str, size))}; set it to 0, or "
                "the last two of data.init_args.size to one number"
            )

    def draw(self, generator: np.random.Generator) -> Alteration[float]:
        """All that is random but the numbers at a place, of displacements, bias fields and noise, which follow from the
        sample's seed.
        """

        def between(width: float) -> float:
            return float(generator.uniform(-width, width))

        turns = int(generator.integers(1, 4)) * (generator.random() < self.turn)
        moved = [
            self.elastic * float(generator.random()),
            *(between(self.shift) for _ in range(3)),
            *(between(self.degrees) for _ in range(3)),
            1 + between(self.scale),
            float(turns),
            *(float(generator.random() < chance) for chance in self.flip),
        ]
        scaled = [1 + between(self.gain), between(self.offset), 1 + between(self.gamma)]
        # These draw last, and where they are used, so that augmentations without them are what they were before.
        thick = [1.0] * 3
        if self.anisotropy > 1:
            thick[int(generator.integers(3))] = float(generator.uniform(1, self.anisotropy))
        bias, noise = (most and float(generator.uniform(0, most)) for most in (self.bias, self.noise))
        return Alteration._make([*moved, *thick, bias, *scaled, noise])

    def altered(
        self, volume_BC: Tensor, a: Alteration[Tensor], spacing_B3: Tensor, seed_B: Tensor, stream: int
    ) -> tuple[Tensor, Tensor | None]:
        """float32 [B C D H W] altered, and where each of its voxels comes from, as `torch.nn.functional.grid_sample`
        takes it; None where no voxel may move. What comes from outside is 0.

        Args:
            a: float32 [B] each.
            stream: tells the random numbers of several crops of one sample apart.
        """
        grid = self._origins(volume_BC.shape[2:], a, spacing_B3, seed_B, stream) if self.moves else None
        if grid is not None:
            volume_BC = F.grid_sample(volume_BC, grid, padding_mode="zeros", align_corners=False)
        gain, offset, gamma, bias, noise = (
            x_B.view(-1, 1, 1, 1, 1) for x_B in (a.gain, a.offset, a.gamma, a.bias, a.noise)
        )
        if self.anisotropy > 1:
            for axis, thick_B in enumerate((a.thick_d, a.thick_h, a.thick_w)):
                volume_BC = thickened(volume_BC, thick_B, 2 + axis)
        if self.bias:
            points = hashed_noise(mixed_seed(seed_B, BIAS), stream, (1, *[self.points] * 3))
            field = F.interpolate(points, tuple(volume_BC.shape[2:]), mode="trilinear", align_corners=True)
            volume_BC = volume_BC * (bias * field).exp()
        if self.gamma:
            volume_BC = volume_BC.sign() * volume_BC.abs() ** gamma
        volume_BC = volume_BC * gain + offset
        if self.noise:
            volume_BC = volume_BC + noise * hashed_noise(mixed_seed(seed_B, NOISE), stream, tuple(volume_BC.shape[1:]))
        return volume_BC, grid

    def _origins(
        self, sides: torch.Size, a: Alteration[Tensor], spacing_B3: Tensor, seed_B: Tensor, stream: int
    ) -> Tensor:
        """[B D H W 3]; the last axis is in the order W, H, D."""
        device = spacing_B3.device
        axes = [torch.arange(side, device=device, dtype=torch.float32) - (side - 1) / 2 for side in sides]
        to_DHW3 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # voxels from the middle
        turned_B33 = (
            _quarter_turns(a.turns) * torch.stack([1 - 2 * a.flip_d, 1 - 2 * a.flip_h, 1 - 2 * a.flip_w], 1)[:, None]
        )
        in_mm_B33 = _rotations(a.angle_d, a.angle_h, a.angle_w) / a.zoom[:, None, None]
        map_B33 = in_mm_B33 * (spacing_B3[:, None, :] / spacing_B3[:, :, None]) @ turned_B33
        from_BDHW3 = torch.einsum("bij,dhwj->bdhwi", map_B33, to_DHW3)
        from_BDHW3 = from_BDHW3 + torch.stack([a.shift_d, a.shift_h, a.shift_w], dim=1)[:, None, None, None]
        if self.elastic:
            points = hashed_noise(seed_B, stream, (3, *[self.points] * 3))
            bent = F.interpolate(points, tuple(sides), mode="trilinear", align_corners=True)
            from_BDHW3 = from_BDHW3 + (a.bend.view(-1, 1, 1, 1, 1) * bent).movedim(1, -1)
        return torch.stack([2 * at / side for at, side in zip(from_BDHW3.unbind(-1), sides, strict=True)][::-1], dim=-1)

    def labels(self, label_BDHW: Tensor, grid: Tensor | None) -> Tensor:
        """Labels of the voxels that are nearest to where `altered` takes its own from; -1 from outside."""
        if grid is None:
            return label_BDHW
        moved = F.grid_sample(
            (label_BDHW[:, None] - NO_LABEL).float(), grid, "nearest", padding_mode="zeros", align_corners=False
        )
        return moved[:, 0].long() + NO_LABEL


@dataclass(frozen=True)
class AlteredVolumes:
    """Makes of a batch with numbers `drawn`, int32 [B V P], one whose crops are altered and whose `parameters` say how,
    float32 [B V P]. Crops are `volume`, or each of `views`.
    """

    augmentation: VolumeAugmentation

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in batch.items() if name not in ("drawn", "seed")}
        parameters_BVP, spacing_B3 = batch["drawn"].view(torch.float32), batch["spacing"].float()
        crops = batch["views"] if "views" in batch else [batch["volume"]]
        made = []
        for number, crop_BC in enumerate(crops):
            a = Alteration(*parameters_BVP[:, number].unbind(1))
            crop_BC, grid = self.augmentation.altered(crop_BC.float(), a, spacing_B3, batch["seed"], number)
            # What is missing stays 0.
            made.append(crop_BC * batch["present"][:, :, None, None, None])
        if "segmentation" in batch:
            rest["segmentation"] = self.augmentation.labels(batch["segmentation"], grid)
        if "inside" in batch:
            rest["inside"] = self.augmentation.labels(batch["inside"].long(), grid) > 0
        named = {"views": made} if "views" in batch else {"volume": made[0]}
        return {**rest, **named, "parameters": parameters_BVP}


def thickened(volume_BC: Tensor, thick_B: Tensor, axis: int) -> Tensor:
    """As a scan with `thick_B` times the spacing along an axis shows it, at the voxels that there were: every voxel
    that is nearest to a multiple of it, counted from the first, and linear between these. 1 changes nothing.
    """
    side = volume_BC.shape[axis]
    thick_B1 = thick_B[:, None]
    at_BS = torch.arange(side, device=volume_BC.device) / thick_B1
    lower_BS = at_BS.floor()
    shape = [len(volume_BC), *(side if other == axis else 1 for other in range(1, volume_BC.ndim))]

    def of(long_BS: Tensor) -> Tensor:
        nearest_BS = (long_BS * thick_B1).round().clamp_max(side - 1).long()
        return volume_BC.gather(axis, nearest_BS.view(shape).expand_as(volume_BC))

    return torch.lerp(of(lower_BS), of(lower_BS + 1), (at_BS - lower_BS).view(shape).to(volume_BC))


def bits(drawn: list[Alteration[float]]) -> Tensor:
    """int32 [V P]: whole numbers, because mixed or low precision rounds all others before they are on the device."""
    return torch.tensor(drawn, dtype=torch.float32).view(torch.int32)


def _rotations(*degrees_B: Tensor) -> Tensor:
    """About D, then H, then W: [B 3 3]."""
    whole_B33 = torch.eye(3, device=degrees_B[0].device).expand(len(degrees_B[0]), 3, 3)
    for axis, angle_B in enumerate(degrees_B):
        first, second = (other for other in range(3) if other != axis)
        cos, sin = (angle_B * (math.pi / 180)).cos(), (angle_B * (math.pi / 180)).sin()
        turn_B33 = torch.eye(3, device=angle_B.device).repeat(len(angle_B), 1, 1)
        turn_B33[:, first, first] = turn_B33[:, second, second] = cos
        turn_B33[:, first, second], turn_B33[:, second, first] = -sin, sin
        whole_B33 = turn_B33 @ whole_B33
    return whole_B33


def _quarter_turns(turns_B: Tensor) -> Tensor:
    """In the plane of H and W, whole numbers: [B 3 3]."""
    cos, sin = (turns_B == 0).float() - (turns_B == 2).float(), (turns_B == 1).float() - (turns_B == 3).float()
    turn_B33 = torch.zeros(len(turns_B), 3, 3, device=turns_B.device)
    turn_B33[:, 0, 0] = 1
    turn_B33[:, 1, 1] = turn_B33[:, 2, 2] = cos
    turn_B33[:, 1, 2], turn_B33[:, 2, 1] = sin, -sin
    return turn_B33
