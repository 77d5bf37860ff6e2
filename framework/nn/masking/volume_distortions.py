"""Volumes distorted in four ways that a network can undo: intensities along a curve, voxels exchanged with their
neighbours, boxes of noise inside, and noise all around.

Source: Zhou et al., "Models Genesis", Medical Image Analysis 2021, arXiv 2004.07882, section 3.2, and the authors'
code. What is drawn is a function of seed, step and the volume's number, and is made where the volumes are.
Shapes: B volumes, C channels, D H W voxels, N of them, P points of a curve.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.noise import hashed_uniform, mixed_seed
from lightspan.core.ranges import require_in, require_shares

POINTS = 4096
SHUFFLE, PAINT = 1, 2
"""What is mixed into the seeds of random numbers at a place."""
MARGIN = 3
"""Voxels between a box and the faces of the volume, where there is room."""
Box = tuple[slice, ...]


@dataclass(frozen=True)
class VolumeDistortions:
    """Of each volume by itself, in this order: `shuffled` in windows, `along_curves`, and one of two paintings.

    Painted inside, up to five boxes are noise, with sides from a sixth to a third of the volume's. Painted outside, all
    is noise but the union of up to five boxes, with sides from three to four sevenths. The next box is drawn with
    probability 0.95; the first of those that are kept always. Noise is uniform in [0, 1).

    Differs from the authors' code: windows divide the volume, so that no voxel is lost or doubled, where the code
    shuffles 10,000 windows that overlap and each overwrite the ones before.

    Args:
        shuffle, curve, paint: probabilities, in [0, 1].
        outside: probability of the painting outside, of a volume that is painted, in [0, 1].
        window: the largest window as a share of each side, rounded down, in [0, 1]; its sides are uniform from 1 on.
        falling: probability that a curve falls from 1 to 0, in [0, 1].
        seed: >= 0.
    """

    shuffle: float = 0.5
    curve: float = 0.9
    paint: float = 0.9
    outside: float = 0.8
    window: float = 0.1
    falling: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        require_shares(shuffle=self.shuffle, curve=self.curve, paint=self.paint, outside=self.outside)
        require_shares(window=self.window, falling=self.falling)
        require_in("[0, inf)", seed=self.seed)

    def __call__(self, volume_BC: Tensor, step: int, indices: Sequence[int]) -> Tensor:
        """Distorted [B C D H W], in its type.

        Args:
            volume_BC: intensities in [0, 1].
            indices: the volumes' numbers in their dataset.
        """
        sides, device = tuple(volume_BC.shape[2:]), volume_BC.device
        if not len(indices):
            return volume_BC
        edges, corners, controls = list[list[int]](), list[list[int]](), list[list[float]]()
        bent, masks = list[bool](), list[np.ndarray]()
        for index in indices:
            generator = np.random.default_rng((self.seed, step, index))
            edge = [int(generator.integers(1, max(int(self.window * side), 1) + 1)) for side in sides]
            edges.append(edge if generator.random() < self.shuffle else [1] * len(sides))
            corners.append([int(generator.integers(longest)) for longest in edges[-1]])
            *control, falls = generator.random(5)
            controls.append([*control, float(falls < self.falling)])
            bent.append(generator.random() < self.curve)
            masks.append(self._painted(sides, generator))
        seed_B = mixed_seed(torch.tensor([*indices], device=device), self.seed, step)
        windows = torch.tensor(edges, device=device), torch.tensor(corners, device=device)
        volume_BC = shuffled(volume_BC, *windows, mixed_seed(seed_B, SHUFFLE))
        curved_BC = along_curves(volume_BC, torch.tensor(controls, dtype=torch.float32, device=device))
        bent_B = torch.tensor(bent, device=device).view(-1, *(1 for _ in volume_BC.shape[1:]))
        volume_BC = torch.where(bent_B, curved_BC, volume_BC)
        noise_BC = hashed_uniform(mixed_seed(seed_B, PAINT), 0, tuple(volume_BC.shape[1:])).to(volume_BC)
        return torch.where(torch.from_numpy(np.stack(masks)).to(device)[:, None], noise_BC, volume_BC)

    def _painted(self, sides: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
        """bool [D H W], where noise is."""
        painted, inside = generator.random() < self.paint, generator.random() >= self.outside
        if not painted:
            return np.zeros(sides, bool)
        mask = np.full(sides, not inside)
        for number in range(5):
            if (number or inside) and generator.random() >= 0.95:
                break
            mask[box(sides, generator, inner if inside else kept)] = inside
        return mask


def inner(side: int, generator: np.random.Generator) -> int:
    """The side of a box that is painted, at least 1."""
    return max(int(generator.integers(side // 6, side // 3 + 1)), 1)


def kept(side: int, generator: np.random.Generator) -> int:
    """The side of a box around which all is painted, at least 1."""
    return side - int(generator.integers(3 * side // 7, 4 * side // 7 + 1))


def box(sides: tuple[int, ...], generator: np.random.Generator, long: Callable[[int, np.random.Generator], int]) -> Box:
    """A box within a volume, apart from its faces where there is room."""
    lengths = [long(side, generator) for side in sides]
    found = []
    for side, length in zip(sides, lengths, strict=True):
        margin = min(MARGIN, (side - length) // 2)
        first = int(generator.integers(margin, side - length - margin + 1))
        found.append(slice(first, first + length))
    return tuple(found)


def along_curves(volume_BC: Tensor, control_B5: Tensor, points: int = POINTS) -> Tensor:
    """Intensities along a Bezier curve of third order from (0, 0) to (1, 1), which never falls, or mirrored from (0, 1)
    to (1, 0), which never rises: in the type of the volume, and in [0, 1]. What lies outside of [0, 1] counts as its
    nearer end.

    Args:
        control_B5: x and y of the second control point, those of the third, each in [0, 1], and 1 for a curve that
            falls, else 0. With points on the diagonal it is the identity.
        points: P, between which the curve is a line.
    """
    x1_B1, y1_B1, x2_B1, y2_B1, falls_B1 = wide(control_B5).split(1, dim=1)
    s_P = torch.linspace(0, 1, points, dtype=x1_B1.dtype, device=volume_BC.device)

    def curve(first_B1: Tensor, second_B1: Tensor) -> Tensor:
        found_BP = 3 * (1 - s_P) ** 2 * s_P * first_B1 + 3 * (1 - s_P) * s_P**2 * second_B1 + s_P**3
        return found_BP.cummax(dim=1).values.clamp(0, 1)  # against rounding

    x_BP, y_BP = curve(x1_B1, x2_B1), curve(y1_B1, y2_B1)
    y_BP = torch.where(falls_B1 > 0, y_BP.flip(1), y_BP)
    given_BN = volume_BC.flatten(1).to(x_BP).clamp(0, 1).contiguous()
    upper_BN = torch.searchsorted(x_BP, given_BN).clamp(1, points - 1)
    (x0, x1), (y0, y1) = ((of_BP.gather(1, upper_BN - 1), of_BP.gather(1, upper_BN)) for of_BP in (x_BP, y_BP))
    share_BN = ((given_BN - x0) / (x1 - x0).clamp_min(torch.finfo(x0.dtype).tiny)).clamp(0, 1)
    return torch.lerp(y0, y1, share_BN).view_as(volume_BC).to(volume_BC)


def shuffled(volume_BC: Tensor, edge_B3: Tensor, corner_B3: Tensor, seed_B: Tensor) -> Tensor:
    """Each voxel goes to a random place of its window, all channels alike; nothing leaves its window.

    Args:
        edge_B3: sides of the windows that divide a volume, int64, at least 1.
        corner_B3: how far a first window reaches out of the volume, int64, below its sides.
        seed_B: int64.
    """
    sides = volume_BC.shape[2:]
    window_BN = torch.zeros(len(volume_BC), 1, dtype=torch.int64, device=volume_BC.device)
    for axis, side in enumerate(sides):
        at_BS = (torch.arange(side, device=volume_BC.device) + corner_B3[:, axis, None]) // edge_B3[:, axis, None]
        window_BN = (window_BN[:, :, None] * (side + 1) + at_BS[:, None]).flatten(1)
    in_order_BN = window_BN.argsort(dim=1, stable=True)
    any_order_BN = hashed_uniform(seed_B, 0, (window_BN.shape[1],)).argsort(dim=1)
    mixed_BN = any_order_BN.gather(1, window_BN.gather(1, any_order_BN).argsort(dim=1, stable=True))
    to_BCN, from_BCN = (places[:, None].expand(-1, volume_BC.shape[1], -1) for places in (in_order_BN, mixed_BN))
    voxels_BCN = volume_BC.flatten(2)
    return torch.empty_like(voxels_BCN).scatter(2, to_BCN, voxels_BCN.gather(2, from_BCN)).view_as(volume_BC)
