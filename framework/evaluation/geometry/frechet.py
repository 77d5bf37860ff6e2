"""How far apart two sets of images are, as Gaussians in a space of a few features.

Source: Dowson, Landau, 1982 (the distance of Gaussians); Heusel et al., 2017, arXiv 1706.08500 (its use on features of
images). Shapes: N, M rows, D features, R directions.
"""

import math

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.moments import Moments
from lightspan.evaluation.scale import scaled
from lightspan.subspaces.svd import thin_svd


def principal_directions(rows_ND: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and the `count` directions of largest variance [D R], orthonormal columns, in float64.

    Raises: UserError for a count outside [1, min(N - 1, D)], or rows that are not finite.
    """
    _require_finite(rows_ND)
    most = min(len(rows_ND) - 1, rows_ND.shape[1])
    if not 1 <= count <= most:
        raise UserError(f"{count} principal directions are outside [1, {most}], what {list(rows_ND.shape)} rows span")
    mean_D = rows_ND.double().mean(dim=0)
    return mean_D, thin_svd(rows_ND.double() - mean_D)[2][:count].T


def frechet_distance(a_ND: Tensor, b_MD: Tensor) -> float:
    """`gaussian_distance` of the two sets' means and unbiased covariances; 0 for equal moments.

    Small sets seem farther apart than they are: compare only distances between sets of equal size.

    Raises: UserError for fewer than 2 rows, sets of different width, features that are not finite, or a distance that
        float64 cannot hold.
    """
    _require_finite(a_ND, b_MD)
    if min(len(a_ND), len(b_MD)) < 2 or a_ND.shape[1] != b_MD.shape[1]:
        raise UserError(f"sets of {list(a_ND.shape)} and {list(b_MD.shape)} need at least 2 rows and equal width")
    scale, sets = scaled(a_ND, b_MD)
    a, b = (Moments.of(rows) for rows in sets)
    distance = gaussian_distance(a.mean_CD[0], a.covariance(), b.mean_CD[0], b.covariance()) * scale * scale
    if not math.isfinite(distance):
        raise UserError(
            f"features near {scale:.3g} are so large that their squared distance overflows; scale them down"
        )
    return distance


def gaussian_distance(mean_a_D: Tensor, cov_a_DD: Tensor, mean_b_D: Tensor, cov_b_DD: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2), >= 0, in float64. Raises: UserError where that overflows."""
    mean_a_D, cov_a_DD, mean_b_D, cov_b_DD = (x.double() for x in (mean_a_D, cov_a_DD, mean_b_D, cov_b_DD))
    if not (cov_a_DD.isfinite().all() and (cov_a_DD @ cov_b_DD).isfinite().all()):
        raise UserError("features are so large that the squares of their covariances overflow; scale them down")
    # tr (C_a C_b)^1/2 from the symmetric product A C_b A with A = C_a^1/2, whose eigenvalues are real.
    values_D, vectors_DD = torch.linalg.eigh(cov_a_DD)
    root_DD = vectors_DD * values_D.clamp_min(0).sqrt() @ vectors_DD.T
    cross = torch.linalg.eigvalsh(root_DD @ cov_b_DD @ root_DD).clamp_min(0).sqrt().sum()
    distance = (mean_a_D - mean_b_D).square().sum() + cov_a_DD.trace() + cov_b_DD.trace() - 2 * cross
    return float(distance.clamp_min(0))


def _require_finite(*sets: Tensor) -> None:
    if not all(bool(rows.isfinite().all()) for rows in sets):
        raise UserError("features contain NaN or infinite values, which have no moments; the model has diverged")
