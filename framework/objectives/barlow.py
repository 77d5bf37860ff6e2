"""Redundancy reduction: the Barlow Twins loss and the mixed-sample term that guards it against overfitting.

Source: Zbontar et al., "Barlow Twins", 2021, arXiv 2103.03230, eq. 1-2 (standardisation, C, L_BT); Bandara et al.,
"Guarding Barlow Twins Against Overfitting with Mixed Samples", 2023, arXiv 2312.02151, and the formula in the README of
the authors' code (targets and L_reg). That code's ImageNet script has a Z2^T Z2 in the second target, for which L_reg
is not zero at a = 1; here the formula holds. Its factor 0.5 and its warm-up of the weight are left out.
Shapes: B rows of this rank, D embedding width. Sums over B run over all ranks (scale: see
`lightspan.core.distributed`). Half precision is widened to float32, also under autocast: a correlation of bfloat16
numbers has two digits. Deviations are biased, as in eq. 2, whose C_ij is a cosine, and in the BatchNorm of the authors'
code; the unbiased ones of the paper's pseudo-code leave equal views a loss of D / B^2.
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.distributed import all_reduce_sum
from lightspan.objectives.means import sum_over_rows

# Added to the variance, so that a feature that is constant over the batch gives 0 with a finite gradient, not NaN.
# Small enough for a feature of unit variance to move by 5e-13: equalities hold to 1e-10 as they would without it.
VARIANCE_EPS = 1e-12
# The largest error of a mean, in rounding units; a feature that varies less about its mean counts as constant.
ROUNDINGS = 16


def standardise(x_BD: Tensor) -> Tensor:
    """Each feature to mean 0 and standard deviation 1 (biased: a mean square of 1) over the batch of all ranks.

    A feature that is constant up to rounding becomes nearly 0 and has a finite gradient. So do all features if all
    ranks together have only one row.
    """
    x_BD = wide(x_BD)
    total_D, rows = sum_over_rows(x_BD.sum(dim=0), len(x_BD))
    mean_D = total_D / rows.clamp_min(1)
    centred_BD = x_BD - mean_D
    variance_D = all_reduce_sum(centred_BD.square().sum(dim=0)) / rows.clamp_min(1)
    floor_D = (ROUNDINGS * torch.finfo(x_BD.dtype).eps * mean_D.detach()).square() + VARIANCE_EPS
    return centred_BD * (variance_D + floor_D).rsqrt()


def cross_correlation(a_BD: Tensor, b_BE: Tensor) -> Tensor:
    """C = A^T B / B, [D E], over the batch of all ranks, 0 without rows; row i of both comes from image i."""
    with torch.autocast(a_BD.device.type, enabled=False):
        total_DE, rows = sum_over_rows(wide(a_BD).T @ wide(b_BE), len(a_BD))
    return total_DE / rows.clamp_min(1)


def barlow_twins_loss(z1_BD: Tensor, z2_BD: Tensor, off_diagonal_weight: float) -> Tensor:
    """L_BT = sum_i (C_ii - 1)^2 + off_diagonal_weight * sum_{i != j} C_ij^2 (2103.03230 eq. 1).

    Args:
        z1_BD, z2_BD: standardised embeddings of two views.
        off_diagonal_weight: lambda, dimensionless, >= 0.
    Returns: scalar >= 0, a sum over D^2 entries.
    """
    c_DD = cross_correlation(z1_BD, z2_BD)
    diagonal_D = c_DD.diagonal()
    # Masked, not subtracted (all squares minus the diagonal's): the difference of near-equal sums loses digits.
    off_diagonal_DD = c_DD - torch.diag(diagonal_D)
    return (diagonal_D - 1).square().sum() + off_diagonal_weight * off_diagonal_DD.square().sum()


def mixed_regulariser(zm_BD: Tensor, z1_BD: Tensor, z2_BD: Tensor, mix: Tensor, permutation_B: Tensor) -> Tensor:
    """L_reg = ||Zm^T Z1 / B - T1||_F^2 + ||Zm^T Z2 / B - T2||_F^2 with T_v = (a Z1 + (1 - a) Z2[p])^T Z_v / B.

    Zero for an encoder that is linear in its input; gradients flow through the targets as well.

    Args:
        zm_BD: standardised embedding of a * x1 + (1 - a) * x2[p].
        z1_BD, z2_BD: standardised embeddings of x1 and x2.
        mix: a, scalar in [0, 1]. Ranks may differ in a and p: both act only on their own rows.
        permutation_B: p, int64, a permutation of this rank's rows.
    Returns: scalar >= 0, a sum over 2 D^2 entries.
    """
    # C is linear in its left side, so each difference is one product, (Zm - a Z1 - (1 - a) Z2[p])^T Z_v / B, and both
    # differences are one with Z1 and Z2 concatenated.
    departure_BD = zm_BD - (mix * z1_BD + (1 - mix) * z2_BD[permutation_B])
    return cross_correlation(departure_BD, torch.cat([z1_BD, z2_BD], dim=1)).square().sum()
