"""How many dimensions a matrix really uses. All functions are pure, take any device, and compute in float32 or wider.

Shapes: N rows (samples), D columns (features), S singular values.
"""

import torch
from torch import Tensor


def singular_values(matrix_ND: Tensor, center: bool = False) -> Tensor:
    """Singular values [min(N, D)], falling; with `center` those of the rows after their mean is taken off."""
    wide_ND = matrix_ND.to(torch.promote_types(matrix_ND.dtype, torch.float32))
    return torch.linalg.svdvals(wide_ND - wide_ND.mean(dim=0) if center else wide_ND)


def effective_rank(values_S: Tensor) -> Tensor:
    """exp of the entropy of the singular values as shares of their sum; in [1, S], S when all are equal, 0 for zeros.

    Source: Roy, Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007), definition 1.
    """
    total = values_S.sum()
    share_S = values_S / torch.where(total > 0, total, torch.ones_like(total))
    return torch.where(total > 0, torch.special.entr(share_S).sum().exp(), torch.zeros_like(total))


def participation_ratio(values_S: Tensor) -> Tensor:
    """(sum e)^2 / sum e^2 over the energies e = s^2; in [1, S], S when all are equal, 0 for zeros."""
    return _ratio(values_S.square().sum().square(), values_S.pow(4).sum())


def stable_rank(values_S: Tensor) -> Tensor:
    """Squared Frobenius norm over squared spectral norm; in [1, S], never above the rank, 0 for zeros."""
    return _ratio(values_S.square().sum(), values_S.square().amax())


def captured_energy(matrix_ND: Tensor, basis_DR: Tensor) -> Tensor:
    """Share of the squared Frobenius norm that stays when rows are projected on orthonormal columns; in [0, 1]."""
    return _ratio((matrix_ND @ basis_DR).square().sum(), matrix_ND.square().sum())


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    safe = torch.where(denominator > 0, denominator, torch.ones_like(denominator))
    return torch.where(denominator > 0, numerator / safe, torch.zeros_like(numerator))
