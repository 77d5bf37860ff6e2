"""Directions from which clouds are seen, a little from above and from all sides.

Shapes: B clouds, V views.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.noise import hashed_uniform, mixed_seed
from lightspan.core.ranges import require_in

Axis = Literal["x", "y", "z", "-x", "-y", "-z"]


@dataclass(frozen=True)
class ViewsFromAbove:
    """Draws a direction and a stretch for each cloud to train on, and has fixed directions for evaluation.

    The defaults are those of the code of P2P (arXiv 2208.02812), whose angles are 0.04 to 1.94 pi about the vertical,
    and -0.4 to -0.2 pi between the vertical and the line of sight. Its views of evaluation begin at an azimuth of 0,
    while here none lies outside of what is drawn in training.

    Args:
        up: the axis of the data that points up. That of ModelNet40 is z, that of LDraw -y.
        azimuth: degrees about it, the lower first.
        elevation: degrees above the horizon, in [-90, 90], the lower first.
        stretch: factors of what lies to the right and of what lies down, drawn for each between these: the projection
            takes no notice of one that both have in common, or of a shift.
        seed: of the draws, >= 0.
    Raises: UserError for settings outside of these.
    """

    up: Axis = "z"
    azimuth: tuple[float, float] = (7.2, 349.2)
    elevation: tuple[float, float] = (18.0, 54.0)
    stretch: tuple[float, float] = (2 / 3, 3 / 2)
    seed: int = 0

    def __post_init__(self) -> None:
        require_in("[-360, 360]", azimuth=self.azimuth)
        require_in("[-90, 90]", elevation=self.elevation)
        require_in("(0, inf)", stretch=self.stretch)
        require_in("[0, inf)", seed=self.seed)
        for name in ("azimuth", "elevation", "stretch"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"{name}=[{low:g}, {high:g}] must be two numbers, the lower first")

    def drawn(self, index_B: Tensor, step: int) -> Tensor:
        """The axes to the right, down and away of each cloud, the first two stretched, float32 [B 3 3]: a function of
        seed, step and the clouds' numbers.
        """
        drawn_B4 = hashed_uniform(mixed_seed(index_B, self.seed, step), 0, (4,))
        ranges = torch.tensor([self.azimuth, self.elevation, self.stretch, self.stretch], device=drawn_B4.device)
        azimuth_B, elevation_B, right_B, down_B = torch.lerp(*ranges.unbind(1), drawn_B4).unbind(1)
        stretch_B3 = torch.stack([right_B, down_B, torch.ones_like(right_B)], dim=1)
        return self.axes(azimuth_B, elevation_B) * stretch_B3[..., None]

    def around(self, sides: int, heights: int) -> Tensor:
        """The axes to the right, down and away from so many sides at so many heights each, float32 [V 3 3]: from the
        middles of equal parts of all azimuths, and from the lowest elevation to the highest, or in their middle.
        """
        left, right = self.azimuth
        low, high = self.elevation
        azimuth = left + (torch.arange(sides) + 0.5) * ((right - left) / sides)
        elevation = torch.linspace(low, high, heights) if heights > 1 else torch.tensor([(low + high) / 2])
        return self.axes(azimuth.repeat(heights), elevation.repeat_interleave(sides))

    def axes(self, azimuth_B: Tensor, elevation_B: Tensor) -> Tensor:
        """The rotations [B 3 3] whose rows are the axes to the right, down and away, as seen from these degrees. At an
        azimuth of 0 the viewer is on the axis that follows `up` in the order x, y, z, x.
        """
        azimuth_B, elevation_B = azimuth_B.deg2rad(), elevation_B.deg2rad()
        cos_B, sin_B, none_B = azimuth_B.cos(), azimuth_B.sin(), torch.zeros_like(azimuth_B)
        low_B, high_B = elevation_B.cos(), elevation_B.sin()
        # In a right-handed frame of the axis that the viewer is on, the one that follows, and up.
        right_B3 = torch.stack([-sin_B, cos_B, none_B], dim=1)
        away_B3 = torch.stack([-low_B * cos_B, -low_B * sin_B, -high_B], dim=1)
        down_B3 = torch.linalg.cross(away_B3, right_B3)
        return torch.stack([right_B3, down_B3, away_B3], dim=1) @ self._frame().to(azimuth_B)

    def _frame(self) -> Tensor:
        """[3 3], whose rows are the frame of `axes` in the coordinates of the data."""
        at = "xyz".index(self.up[-1])
        unit = torch.eye(3)
        first, second, up = unit[(at + 1) % 3], unit[(at + 2) % 3], unit[at]
        return torch.stack([first, -second, -up] if self.up[0] == "-" else [first, second, up])
