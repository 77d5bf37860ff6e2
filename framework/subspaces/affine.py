"""The affine hull of a few points, such as the features of ten images, and the nearest point in it.

Shapes: N points, D numbers of each, K = min(N, D) directions, B points that are compared with a hull.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightspan.core.devices import has_values, wide
from lightspan.core.errors import UserError
from lightspan.subspaces.svd import thin_svd


class AffineHull(NamedTuple):
    """Every affine combination of some points, in float32 or wider.

    Attributes:
        origin_D: their mean.
        basis_DK: orthonormal columns that span their differences, and columns of zeros, which span nothing: K does not
            depend on the rank, so that no number has to be read from the device.
    """

    origin_D: Tensor
    basis_DK: Tensor

    @property
    def rank(self) -> Tensor:
        """Directions that the points span, int64, a scalar; 0 for a single point."""
        return (self.basis_DK != 0).any(dim=0).sum()

    def residual(self, e_BD: Tensor) -> Tensor:
        """e - P(e) [B D], perpendicular to the hull; its length is the distance. In the wider dtype of the two."""
        offset_BD = wide(e_BD) - self.origin_D
        return offset_BD - (offset_BD @ self.basis_DK.to(offset_BD.dtype)) @ self.basis_DK.mT.to(offset_BD.dtype)

    def nearest(self, e_BD: Tensor) -> Tensor:
        """P(e) = m + U U^T (e - m) [B D], the nearest point of the hull, in the wider dtype of the two."""
        return wide(e_BD) - self.residual(e_BD)


@torch.no_grad()
def affine_hull(points_ND: Tensor) -> AffineHull:
    """Neither the order of points nor repeated ones make a difference: directions that only rounding spans are left
    out. As for numpy's `matrix_rank`, that is what is shorter than max(N, D) units in the last place of the points'
    lengths, here with their mean, whose rounding the differences carry. No gradient reaches the points.

    Raises: UserError without any point, or with points that are NaN or infinite.
    """
    points_ND = wide(points_ND)
    if not len(points_ND) or (has_values(points_ND) and not points_ND.isfinite().all()):
        what = "NaN or infinite ones" if len(points_ND) else "none"
        raise UserError(f"an affine hull is spanned by finite points, one at least, and got {what}")
    origin_D = points_ND.mean(dim=0)
    _, lengths_K, basis_KD = thin_svd(points_ND - origin_D)
    rounding = max(points_ND.shape) * torch.finfo(points_ND.dtype).eps * points_ND.norm()
    return AffineHull(origin_D, basis_KD.mT * (lengths_K > rounding))
