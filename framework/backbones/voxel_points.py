"""Networks of voxels as networks of points.

Shapes: N points of all clouds, B clouds, V voxels, D width.
"""

from typing import Literal

from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.voxels.levels import Level, level_of
from lightspan.nn.widths import given_features

# A recipe may name the class listed here.
__all__ = ["VoxelPoints"]


class VoxelPoints(nn.Module):
    """Packed points [N 3], the offsets [B+1] that cut them into clouds and their fields [N 3] -> features of each
    point, [N num_features]: those of its voxel.

    Args:
        network: a level of voxels (`lightspan.nn.voxels.levels.Level`) -> [V D], with `num_features` D, such as
            `lightspan.backbones.sparse_unet.SparseUNet`.
        size: side of a voxel, in the unit of the coordinates.
        fields: of the points, which the network gets besides places: "colour" in [0, 1], "normal" in [-1, 1].
    Raises: UserError for a network that does not say its width, or a side that is not above 0.
    """

    def __init__(
        self, network: nn.Module, size: float = 0.02, fields: tuple[Literal["colour", "normal"], ...] = ("colour",)
    ) -> None:
        super().__init__()
        require_in("(0, inf)", size=size)
        if (width := given_features(network)) is None:
            raise UserError(
                f"{type(network).__name__} has no num_features, the width of its features; use a network of voxels "
                "that has, such as lightspan.backbones.sparse_unet.SparseUNet"
            )
        self.network, self.size, self.fields, self.num_features = network, size, tuple(fields), width

    def level(self, xyz_N3: Tensor, offsets: Tensor, *fields: Tensor) -> tuple[Level, Tensor]:
        """The voxels, and that of each point, int64 [N]."""
        signals = (
            2 * field - 1 if name == "colour" else field for name, field in zip(self.fields, fields, strict=True)
        )
        return level_of(xyz_N3, offsets, self.size, [*signals])

    def forward(self, xyz_N3: Tensor, offsets: Tensor, *fields: Tensor) -> Tensor:
        level, voxel_N = self.level(xyz_N3, offsets, *fields)
        return self.network(level).index_select(0, voxel_N)
