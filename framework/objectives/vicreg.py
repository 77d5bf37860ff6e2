"""VICReg: views agree, every feature keeps its variance, and features are uncorrelated.

Source: Bardes, Ponce, LeCun, "VICReg: Variance-Invariance-Covariance Regularization", ICLR 2022, arXiv 2105.04906,
eq. 1-6 and the authors' code. Where the two differ, the code holds: eq. 5 sums the squared distance over features,
which the code averages, and the code halves the sum of both views' variance terms. The paper's weights, 25, 25 and 1,
are the code's. That code takes the invariance over the rows of one rank; here all sums run over all ranks.
Shapes: B rows of this rank, N of all ranks, D embedding width. Half precision is widened to float32, also under
autocast.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.objectives.means import sum_over_rows

VARIANCE_EPS = 1e-4
"""eps of eq. 2: the root of a feature that is constant over the batch then has a finite slope."""


class VICRegTerms(NamedTuple):
    """Scalars >= 0, the same on all ranks."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor

    def weighted(self, invariance: float, variance: float, covariance: float) -> Tensor:
        """The loss, eq. 6."""
        return invariance * self.invariance + variance * self.variance + covariance * self.covariance


def vicreg_terms(z1_BD: Tensor, z2_BD: Tensor, target: float = 1.0) -> VICRegTerms:
    """s, (v(Z) + v(Z')) / 2 and c(Z) + c(Z').

    s is the mean squared difference of both views, v the mean over features of max(0, target - sqrt(variance + eps)),
    and c the sum of squared covariances of different features over D. Variances are unbiased. If all ranks together
    have one row or none, its features have variance and covariance 0, as those of equal rows.

    Args:
        z1_BD, z2_BD: row i of both comes from image i.
        target: gamma, the standard deviation below which a feature is pushed apart.
    """
    with torch.autocast(z1_BD.device.type, enabled=False):
        z_2BD = wide(torch.stack([z1_BD, z2_BD]))
        distance_D = (z_2BD[0] - z_2BD[1]).square().sum(dim=0)
        sums_3D, rows = sum_over_rows(torch.stack([*z_2BD.sum(dim=1), distance_D]), len(z1_BD))
        centred_2BD = z_2BD - sums_3D[:2, None] / rows.clamp_min(1)
        products_2DD, _ = sum_over_rows(centred_2BD.mT @ centred_2BD, 0)
    covariance_2DD = products_2DD / (rows - 1).clamp_min(1)
    variance_2D = covariance_2DD.diagonal(dim1=1, dim2=2)
    # Masked, not subtracted: the difference of near-equal sums loses digits.
    off_diagonal_2DD = covariance_2DD - torch.diag_embed(variance_2D)
    return VICRegTerms(
        sums_3D[2].mean() / rows.clamp_min(1),
        _lacking(variance_2D, target),
        off_diagonal_2DD.square().sum() / z1_BD.shape[1],
    )


def invariance(z1_BD: Tensor, z2_BD: Tensor) -> Tensor:
    """s: the mean squared difference over features and the rows of all ranks; 0 without rows."""
    with torch.autocast(z1_BD.device.type, enabled=False):
        total_D, rows = sum_over_rows((wide(z1_BD) - wide(z2_BD)).square().sum(dim=0), len(z1_BD))
    return total_D.mean() / rows.clamp_min(1)


def variance(z_BD: Tensor, target: float = 1.0) -> Tensor:
    """v of one view, eq. 1 and 2: see `vicreg_terms`."""
    with torch.autocast(z_BD.device.type, enabled=False):
        z_BD = wide(z_BD)
        total_D, rows = sum_over_rows(z_BD.sum(dim=0), len(z_BD))
        squares_D, _ = sum_over_rows((z_BD - total_D / rows.clamp_min(1)).square().sum(dim=0), 0)
    return _lacking(squares_D / (rows - 1).clamp_min(1), target)


def covariance(z_BD: Tensor) -> Tensor:
    """c of one view: the sum of squared covariances of different features of all ranks' rows, over D; 0 for one row."""
    with torch.autocast(z_BD.device.type, enabled=False):
        z_BD = wide(z_BD)
        total_D, rows = sum_over_rows(z_BD.sum(dim=0), len(z_BD))
        centred_BD = z_BD - total_D / rows.clamp_min(1)
        products_DD, _ = sum_over_rows(centred_BD.T @ centred_BD, 0)
    covariance_DD = products_DD / (rows - 1).clamp_min(1)
    off_diagonal_DD = covariance_DD - torch.diag_embed(covariance_DD.diagonal())
    return off_diagonal_DD.square().sum() / z_BD.shape[1]


def _lacking(variance: Tensor, target: float) -> Tensor:
    """How far standard deviations lie below the target, the mean."""
    return (target - (variance + VARIANCE_EPS).sqrt()).relu().mean()


def vicreg_loss(
    z1_BD: Tensor,
    z2_BD: Tensor,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
) -> Tensor:
    """lambda s + mu (v(Z) + v(Z')) / 2 + nu (c(Z) + c(Z')), eq. 6; see `vicreg_terms`."""
    return vicreg_terms(z1_BD, z2_BD).weighted(invariance_weight, variance_weight, covariance_weight)
