"""How many dimensions a matrix really uses. All functions are pure, take any device, and compute in float32 or wider.
NaN in gives NaN out; zeros, and matrices without rows or columns, use 0 dimensions. No measure depends on scale.

Measures of singular values treat leading axes as a batch: [... S] gives [...].
Shapes: N rows (samples), D columns (features), S singular values, R columns of a frame.
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide


def singular_values(matrix_ND: Tensor, center: bool = False) -> Tensor:
    """Singular values [min(N, D)], descending; with `center` those of the rows after subtracting their mean."""
    matrix_ND = centred(matrix_ND) if center else wide(matrix_ND)
    sound = matrix_ND.isfinite().all()  # LAPACK may raise on NaN
    values_S = torch.linalg.svdvals(matrix_ND.where(sound, 0))
    return values_S.where(sound, torch.nan)


def centred(rows_ND: Tensor) -> Tensor:
    """Rows minus their mean; exactly zero if all rows are equal, where the mean alone would leave rounding errors."""
    from_first_ND = wide(rows_ND) - wide(rows_ND[:1])
    return from_first_ND - from_first_ND.mean(dim=0)


def gram_singular_values(gram_NN: Tensor) -> Tensor:
    """Singular values [... S] of matrices X from X^T X or X X^T [... S S], descending; NaN for a Gram that is not
    finite.

    A Gram has the square of X's condition number: in float64 values below 1e-8 of the largest are rounding errors.
    """
    sound = gram_NN.isfinite().all(dim=-1).all(dim=-1)[..., None]
    # LAPACK refuses the whole batch for one NaN, and checking for it here would make a device wait.
    energy_S = torch.linalg.eigvalsh(torch.where(sound[..., None], gram_NN, torch.zeros_like(gram_NN))).flip(-1)
    return torch.where(sound, energy_S.clamp_min(0).sqrt(), torch.full_like(energy_S, torch.nan))


def effective_rank(values_S: Tensor) -> Tensor:
    """exp of the entropy of the singular values as shares of their sum; in [1, S], S if all are equal, 0 for zeros.

    Source: Roy, Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007), definition 1.
    """
    relative_S = _relative(values_S)
    total = relative_S.sum(dim=-1)
    entropy = torch.special.entr(_ratio(relative_S, total[..., None])).sum(dim=-1)
    return torch.where(total == 0, torch.zeros_like(total), entropy.exp())


def singular_value_entropy(values_S: Tensor) -> Tensor:
    """SVE of Chen et al. (arXiv 2309.17002, section 2.3): the entropy in nats of the singular values as shares of their
    sum, in [0, log S], [...]: high where features spread over many directions. 0 for zeros, and for one value.
    """
    return effective_rank(values_S).clamp_min(1).log()


def largest_value_ratio(values_S: Tensor) -> Tensor:
    """LSVR of the same: -log of the largest singular value's share of their sum, in nats, in [0, log S], [...]: high
    where the strongest direction has lost its lead. 0 for zeros, and for one value.
    """
    relative_S = _relative(values_S)
    return relative_S.sum(dim=-1).clamp_min(1).log()  # the largest is 1


def participation_ratio(values_S: Tensor) -> Tensor:
    """(sum e)^2 / sum e^2 over the energies e = s^2; in [1, S], S if all are equal, 0 for zeros."""
    share_S = energy_shares(values_S)
    return _ratio(share_S.sum(dim=-1), share_S.square().sum(dim=-1))


def stable_rank(values_S: Tensor) -> Tensor:
    """Squared Frobenius norm over squared spectral norm; in [1, S], never above the rank, 0 for zeros."""
    return _relative(values_S).square().sum(dim=-1)


def energy_shares(values_S: Tensor) -> Tensor:
    """s^2 over their sum, [... S]; zeros for zeros."""
    energy_S = _relative(values_S).square()
    return _ratio(energy_S, energy_S.sum(dim=-1, keepdim=True))


def leading_energy(values_S: Tensor, rank: int) -> Tensor:
    """Share of the energy in the `rank` strongest directions, which no frame of that rank exceeds; in [0, 1], [...].

    `values_S` is descending, as from `singular_values`.
    """
    return energy_shares(values_S)[..., :rank].sum(dim=-1)


def energy_rank(values_S: Tensor, share: float) -> int:
    """The least rank whose directions hold that share of the energy, of descending values [S]; 0 for zeros."""
    energy_S = energy_shares(values_S)
    if not energy_S.any():
        return 0
    return min(len(energy_S), int((energy_S.cumsum(dim=0) < share - 1e-12).sum()) + 1)


def _relative(values_S: Tensor) -> Tensor:
    """Divided by the largest magnitude, so that squares neither vanish nor overflow."""
    values_S = wide(values_S)
    return _ratio(values_S, values_S.abs().amax(dim=-1, keepdim=True)) if values_S.shape[-1] else values_S


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    safe = torch.where(denominator == 0, torch.ones_like(denominator), denominator)
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / safe)
