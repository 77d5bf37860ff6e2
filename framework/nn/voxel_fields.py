"""Radiance fields of voxels, fitted to posed views: from pictures of a scene to a grid of colour and opacity.

Source: colour and density at the corners of voxels, trilinear between them, and the density's activation after that:
Sun, Sun, Chen, "Direct Voxel Grid Optimization", CVPR 2022, arXiv 2111.11215; rendered as in NeRF
(`lightspan.nn.rendering`). Colours do not depend on the direction from which a point is seen: the mean over directions
is what NeRF-MAE (arXiv 2404.01300) keeps of a field.
Shapes: V views, H W pixels, R rays, S samples of each, D H W voxels along z, y and x.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.volume.batch import CameraViews
from lightspan.nn.rendering import Rays, along, camera_rays, composited, crossing, seen_by_density

COARSER = 4, 2, 1
"""How many times as long the sides of voxels are, one after the other."""
FIRST_ALPHA = 0.005  # of a voxel before any step: below what NeRF-MAE counts as filled


def view_rays(views: CameraViews) -> tuple[Rays, Tensor]:
    """(rays of all pixels, their colours [V H W 3])."""
    height, width = views.images.shape[2:]
    return camera_rays(views.place, views.rotation, views.intrinsics, height, width), views.images.movedim(1, -1)


class VoxelField(nn.Module):
    """Colour and density anywhere in a box.

    Args:
        sides: voxels along z, y and x, each at least 2.
        low, high: corners of the box, (x, y, z).
    """

    low_3: Tensor
    high_3: Tensor

    def __init__(self, sides: Sequence[int], low: Sequence[float], high: Sequence[float]) -> None:
        super().__init__()
        require_in("[2, inf)", sides=sides)
        if len(sides) != 3 or len(low) != 3 or len(high) != 3 or not all(a < b for a, b in zip(low, high, strict=True)):
            raise UserError(
                f"VoxelField: sides={[*sides]}, low={[*low]} and high={[*high]} need three numbers each, and low < high"
            )
        self.register_buffer("low_3", torch.tensor([*map(float, low)]))
        self.register_buffer("high_3", torch.tensor([*map(float, high)]))
        extent = self.high_3 - self.low_3
        self.voxel = float((extent.prod() / math.prod(sides)) ** (1 / 3))
        # softplus(shift) over one voxel is FIRST_ALPHA.
        self.shift = math.log(math.expm1(-math.log1p(-FIRST_ALPHA)))
        self.stored = nn.Parameter(torch.zeros(1, 4, *sides))

    def _optical(self, stored: Tensor) -> Tensor:
        """Density times the side of a voxel."""
        return F.softplus(stored + self.shift)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """(density [...] per unit of length, colour [... 3] in (0, 1)) of points [... 3]; beyond the box they are those
        of its border.
        """
        at = 2 * (points - self.low_3) / (self.high_3 - self.low_3) - 1
        stored = F.grid_sample(self.stored, at.reshape(1, -1, 1, 1, 3), padding_mode="border", align_corners=False)[
            0, :, :, 0, 0
        ]
        density, colour = self._optical(stored[3]) / self.voxel, stored[:3].T.sigmoid()
        return density.view(points.shape[:-1]), colour.view(points.shape)

    def render(self, rays: Rays, samples: int, jitter_RS: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What rays [R 3] show: (colour [R 3] in front of black, the share that passes the box [R], length [R] to what
        is seen, 0 for nothing).

        Args:
            samples: S, evenly spaced inside the box.
            jitter_RS: see `lightspan.nn.rendering.along`.
        """
        near_R, far_R = crossing(rays, self.low_3, self.high_3)
        at_RS, length_RS = along(near_R, far_R, samples, jitter_RS)
        density_RS, colour_RS3 = self(rays.origin[:, None] + at_RS[..., None] * rays.direction[:, None])
        seen = seen_by_density(density_RS, length_RS)
        length_R = composited(seen.weight, at_RS[..., None])[:, 0] / seen.weight.sum(dim=1).clamp_min(1e-6)
        return composited(seen.weight, colour_RS3), seen.passes, length_R

    @torch.no_grad()
    def resample(self, sides: Sequence[int]) -> None:
        """Stores the field at other voxels, linearly between those that there were; densities stay what they are."""
        stored = F.interpolate(self.stored, tuple(sides), mode="trilinear", align_corners=False)
        self.stored = nn.Parameter(stored)

    def roughness(self) -> Tensor:
        """The mean squared difference of what is stored in neighbours, the sum over the three axes."""
        return torch.stack([self.stored.diff(dim=axis).square().mean() for axis in (2, 3, 4)]).sum()

    @torch.no_grad()
    def grid(self) -> Tensor:
        """Red, green, blue and alpha, float32 [4 D H W] in [0, 1]. Alpha is the opacity over the side of a voxel, so
        that it means the same for boxes of any size.
        """
        stored = self.stored[0].float()
        return torch.cat([stored[:3].sigmoid(), -torch.expm1(-self._optical(stored[3:]))])


def fitted_field(
    views: CameraViews,
    sides: Sequence[int],
    low: Sequence[float],
    high: Sequence[float],
    steps: int = 250,
    rays: int = 1024,
    samples: int | None = None,
    rate: float = 0.4,
    smoothness: float = 1e-3,
    seed: int = 0,
) -> VoxelField:
    """A field that shows these views, by `steps` steps of Adam on rays drawn at random, on the device of the views.

    Coarse voxels come first, of four times and then of twice the side, each for a third of the steps, as views say more
    of large things than of small ones (progressive scaling, DVGO); the mean squared difference of neighbours is
    added to the loss, since few rays cross a voxel (Fridovich-Keil, Yu et al., "Plenoxels", 2022, arXiv 2112.05131).
    What passes the box is filled with a colour drawn anew for each ray, so that light ends inside, as in a room.

    Args:
        sides, low, high: see `VoxelField`.
        steps, rays: >= 1; rays of each step.
        samples: of a ray; None is twice the longest of `sides`.
        rate: above 0, which falls to a tenth.
        smoothness: weight of the differences of neighbours, >= 0.
        seed: of the draws.
    Raises: UserError for settings outside of these, or views without a pixel.
    """
    require_in("[1, inf)", steps=steps, rays=rays, samples=samples)
    require_in("(0, inf)", rate=rate)
    require_in("[0, inf)", smoothness=smoothness)
    if not views.images.numel():
        raise UserError(f"a field is fitted to views, and images are {[*views.images.shape]}; give one or more")
    device = views.images.device
    field = VoxelField(sides, low, high).to(device)
    all_rays, colour = view_rays(views)
    origin_N3, direction_N3, colour_N3 = (part.reshape(-1, 3) for part in (*all_rays, colour))
    generator = torch.Generator().manual_seed(seed)
    count, ends = samples or 2 * max(sides), [steps * number // len(COARSER) for number in range(len(COARSER) + 1)]
    for coarser, (first, end) in zip(COARSER, pairwise(ends), strict=True):
        field.resample([max(2, -(-side // coarser)) for side in sides])
        optimizer = torch.optim.Adam(field.parameters())
        for step in range(first, end):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.1 ** (step / steps)
            row_R = torch.randint(len(colour_N3), (rays,), generator=generator).to(device)
            jitter_RS = torch.rand(rays, count, generator=generator).to(device)
            behind_R3 = torch.rand(rays, 3, generator=generator).to(device)
            shown_R3, passes_R, _ = field.render(Rays(origin_N3[row_R], direction_N3[row_R]), count, jitter_RS)
            loss = F.mse_loss(shown_R3 + passes_R[:, None] * behind_R3, colour_N3[row_R])
            loss = loss + smoothness * field.roughness()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return field.requires_grad_(False)
