"""What the 3x3 filters of a convolution look like, and how far the filters of two networks are apart.

Source: Gavrikov, Keuper, "CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters", CVPR 2022, arXiv
2203.15331: scaling and principal components (section 4), the weighted symmetric divergence (section 4.2), sparsity,
variance entropy and its threshold of randomness (section 5). Orthogonality is that of the authors' later measurements
of layers. The equations are theirs; no table or other content of their database is used here.

What they leave open is decided here: each filter is divided by its own largest magnitude, as their notebook does, where
the text scales whole layers; a bank of zeros has sparsity 1 and entropy 0; singular values of 0 add nothing to an
entropy; all is computed in float64, for half precision loses small filters.

Shapes: N filters, O output channels, J = 9 components, Q bins. A filter is a row of 9 numbers.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lightspan.analysis.moments import Moments
from lightspan.analysis.rows import unit_rows
from lightspan.analysis.spectra import energy_shares, gram_singular_values

SIZE = 9
MOST_ENTROPY = math.log10(SIZE)
EMPTY = torch.finfo(torch.float32).eps
"""Of a bin without filters, before its histogram is brought to a sum of 1 again."""


def has_filters(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape is one of 3x3 filters: [O I 3 3], or [O I D 3 3] for volumes, slice by slice."""
    return len(shape) >= 4 and shape[-2:] == (3, 3)


def filters_of(weight: Tensor) -> Tensor:
    """The filters of a weight [O I 3 3] or [O I D 3 3], float64 [N 9]."""
    return weight.detach().to(torch.float64).reshape(-1, SIZE)


def scaled(filters_N9: Tensor) -> Tensor:
    """Each filter over its largest magnitude, which brings it to [-1, 1]; filters of zeros stay."""
    largest_N1 = filters_N9.abs().amax(dim=1, keepdim=True)
    return filters_N9 / torch.where(largest_N1 > 0, largest_N1, 1)


def sparsity(filters_N9: Tensor, share: float = 0.01) -> float:
    """Share of the filters whose numbers all lie below `share` of the layer's largest; 1 for zeros and no filter."""
    largest_N = filters_N9.abs().amax(dim=1)
    return float((largest_N < share * largest_N.max()).double().mean()) if largest_N.any() else 1.0


def variance_shares(filters_N9: Tensor) -> Tensor:
    """sigma_j^2 over their sum, falling [9], of the filters less their mean; zeros where all filters are equal."""
    largest = filters_N9.abs().max() if filters_N9.numel() else filters_N9.new_zeros(())
    scatter_JJ = Moments.of(filters_N9 / torch.where(largest > 0, largest, 1)).within_DD
    return energy_shares(gram_singular_values(scatter_JJ))


def variance_entropy(filters_N9: Tensor) -> float:
    """H = -sum_j p_j log10 p_j over `variance_shares`, in [0, log10 9]: low where few patterns repeat, high in noise.

    n filters have rank n - 1 at most: below 10 of them H is at most log10(n - 1), whatever they are.
    """
    return float(torch.special.entr(variance_shares(filters_N9)).sum()) / math.log(10)


def random_entropy(filters: int) -> float:
    """T_H(n): at this entropy and above, n filters cannot be told from independent draws. Tends to 0.951."""
    return 1.2618047 / (1 + math.exp(-0.88767525 * (math.log2(filters) - 2.30436435))) - 0.31050834


def orthogonality(weight: Tensor) -> float:
    """1 - sum |W W^T - I| / (O (O - 1)), W [O ...] flattened to rows of norm 1; 1 for orthogonal rows and for one.

    A row of zeros stays one: its place on the diagonal counts as a deviation of 1.
    """
    rows = unit_rows(weight.detach().flatten(1))
    count = len(rows)
    if count < 2:
        return 1.0
    deviation = rows @ rows.T
    deviation.diagonal().sub_(1)
    return 1 - float(deviation.abs().sum(dtype=torch.float64)) / (count * (count - 1))


@dataclass(frozen=True)
class FilterBasis:
    """The principal components of filters.

    Attributes:
        mean_J: the mean filter.
        basis_JJ: a component each row, the strongest first; the sign makes the number of largest magnitude positive.
        explained_J: their shares of the variance; zeros where all filters are equal.
    """

    mean_J: Tensor
    basis_JJ: Tensor
    explained_J: Tensor

    @classmethod
    def of(cls, moments: Moments) -> Self:
        """From the moments of scaled filters, of all networks that are to be compared."""
        values_J, vectors_JJ = torch.linalg.eigh(moments.within_DD)
        basis_JJ = vectors_JJ.T.flip(0)
        sign_J1 = basis_JJ.gather(1, basis_JJ.abs().argmax(dim=1, keepdim=True)).sign()
        return cls(moments.mean_CD[0], basis_JJ * sign_J1, energy_shares(values_J.clamp_min(0).sqrt().flip(0)))

    def coefficients(self, filters_NJ: Tensor) -> Tensor:
        """c = (f - mean) V^T of scaled filters, [N J]."""
        return (filters_NJ - self.mean_J) @ self.basis_JJ.T


def counts(coefficients_NJ: Tensor, least_J: Tensor, greatest_J: Tensor, bins: int) -> Tensor:
    """How many coefficients of each component lie in each of `bins` equal parts of [least, greatest], float64 [J Q]."""
    width_J = greatest_J - least_J
    place_NJ = (coefficients_NJ - least_J) / torch.where(width_J > 0, width_J, 1) * bins
    place_NJ = place_NJ.floor().long().clamp(0, bins - 1)  # the greatest belongs to the last part
    one_each_JN = torch.ones(place_NJ.T.shape, dtype=torch.float64)
    return torch.zeros(place_NJ.shape[1], bins, dtype=torch.float64).scatter_add_(1, place_NJ.T, one_each_JN)


def divergence(first_JQ: Tensor, second_JQ: Tensor, explained_J: Tensor) -> Tensor:
    """D = sum_j explained_j (KL(p_j || q_j) + KL(q_j || p_j)), natural logarithm, of counts [... J Q]: [...]."""
    p, q = (_distribution(x) for x in (first_JQ, second_JQ))
    return (explained_J * ((p - q) * (p.log() - q.log())).sum(dim=-1)).sum(dim=-1)


def noise_floor(
    first_JQ: Tensor, second_JQ: Tensor, explained_J: Tensor, resamples: int, generator: torch.Generator
) -> Tensor:
    """D of `resamples` pairs of the same sizes, all drawn with replacement from both sets together: [resamples].

    What D would be if both were of one distribution: small sets look far apart. Components are drawn one by one.
    """
    pooled_JQ = first_JQ + second_JQ
    first, second = (_drawn(pooled_JQ, int(x_JQ[0].sum()), resamples, generator) for x_JQ in (first_JQ, second_JQ))
    return divergence(first, second, explained_J)


def _distribution(counts_JQ: Tensor) -> Tensor:
    p = counts_JQ / counts_JQ.sum(dim=-1, keepdim=True)
    p = torch.where(p > 0, p, EMPTY)
    return p / p.sum(dim=-1, keepdim=True)


def _drawn(pooled_JQ: Tensor, size: int, resamples: int, generator: torch.Generator) -> Tensor:
    """Counts of `size` draws, [resamples J Q]: binomials of what is left, bin after bin, so that size costs nothing."""
    left_RJ = torch.full((resamples, len(pooled_JQ)), float(size), dtype=torch.float64)
    behind_JQ = pooled_JQ.flip(1).cumsum(1).flip(1)
    share_JQ = torch.where(behind_JQ > 0, pooled_JQ / torch.where(behind_JQ > 0, behind_JQ, 1), 0).clamp(max=1)
    drawn = []
    for share_J in share_JQ.T:
        here_RJ = torch.binomial(left_RJ, share_J.expand_as(left_RJ), generator=generator)
        drawn.append(here_RJ)
        left_RJ = left_RJ - here_RJ
    return torch.stack(drawn, dim=-1)
