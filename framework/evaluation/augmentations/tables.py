"""The Hilbert space that an augmentation defines, exactly, where samples and augmented samples can be counted.

Source: Zhai, Pukdee, Jin, Balcan, Ravikumar, "Understanding Augmentation-based Self-Supervised Representation Learning
via RKHS Approximation and Regression", ICLR 2024, arXiv 2306.00788. With p(a) = E_x p(a | x):

    K_X(x, x') = sum_a p(a | x) p(a | x') / p(a)        K_A(a, a') = E_x[p(a | x) p(a' | x)] / (p(a) p(a'))

have the same eigenvalues 1 = l_1 >= l_2 >= ... above 0; the first eigenfunction is constant. The augmentation
complexity is kappa^2 = max_x K_X(x, x), the number of samples if none shares an augmented sample, and 1 if all do.
Of N samples taken for the distribution it is at most N, whatever the truth.
Shapes: N samples, A augmented samples, D coordinates, R eigenfunctions.
"""

import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_numbers


@dataclass(frozen=True)
class AugmentationTable:
    """p(a | x) and p(x) in float64.

    Attributes:
        given_NA: p(a | x); rows add to 1.
        p_N: p(x), adds to 1. A sample of probability 0 counts in no mean, but functions are extended to it.
    Raises: UserError for what are no probabilities.
    """

    given_NA: Tensor
    p_N: Tensor

    def __post_init__(self) -> None:
        for name, rows in (("given_NA", self.given_NA), ("p_N", self.p_N[None])):
            sums = rows.sum(dim=1)
            if not (rows >= 0).all() or not torch.allclose(sums, torch.ones_like(sums)):
                raise UserError(f"{name} of an augmentation table must be probabilities whose rows add to 1")

    @property
    def p_A(self) -> Tensor:
        return self.p_N @ self.given_NA

    def of_samples(self, rows: Tensor) -> "AugmentationTable":
        """The same augmentation with these samples, numbers with repeats, as the whole distribution."""
        return AugmentationTable(self.given_NA, rows.bincount(minlength=len(self.p_N)).double() / len(rows))

    def kernel(self) -> Tensor:
        """K_X [N N]. Between samples of which one has probability above 0; augmented samples of none are left out."""
        p_A = self.p_A
        there_A = p_A > 0
        half_NA = self.given_NA[:, there_A] / p_A[there_A].sqrt()
        return half_NA @ half_NA.T

    def augmented_kernel(self) -> Tensor:
        """K_A [A A]; zeros for an augmented sample of probability 0."""
        p_A = self.p_A
        scaled_NA = torch.where(p_A > 0, self.given_NA / torch.where(p_A > 0, p_A, 1), 0)
        return scaled_NA.T @ (self.p_N[:, None] * scaled_NA)

    def complexity(self) -> float:
        """kappa^2."""
        return float(self.kernel().diagonal()[self.p_N > 0].max())

    def spectrum(self) -> Tensor:
        """Eigenvalues of K_X, descending, [N]."""
        root_N = self.p_N.sqrt()
        return torch.linalg.eigvalsh(root_N[:, None] * self.kernel() * root_N).flip(0).clamp_min(0)

    def eigenfunctions(self, count: int) -> tuple[Tensor, Tensor]:
        """(l [R], functions [N R]) of the largest eigenvalues, the constant one first, of mean square 1.

        To samples of probability 0 they are extended by Nystrom's formula, f(x) = E_x'[K_X(x, x') f(x')] / l.

        Raises: UserError for more than there are eigenvalues above rounding.
        """
        root_N, kernel_NN = self.p_N.sqrt(), self.kernel()
        values_N, vectors_NN = torch.linalg.eigh(root_N[:, None] * kernel_NN * root_N)
        values_R, vectors_NR = values_N.flip(0)[:count], vectors_NN.flip(1)[:, :count]
        if len(values_R) < count or float(values_R[-1]) < 1e-12:
            raise UserError(f"count={count} must be at most {int((values_N > 1e-12).sum())}, the rank of this kernel")
        return values_R, kernel_NN @ (root_N[:, None] * vectors_NR) / values_R

    def trace_of(self, encoder_AR: Tensor) -> float:
        """The ratio trace tr(F^-1 G) of an encoder of augmented samples: F its covariance, G that of its means over
        the augmentations of a sample. At most the sum of the R largest eigenvalues after the first; directions in which
        the encoder never changes count for nothing.
        """
        p_A = self.p_A
        centred_AR = encoder_AR - p_A @ encoder_AR
        mean_NR = self.given_NA @ centred_AR
        spread_RR = centred_AR.T @ (p_A[:, None] * centred_AR)
        return float(
            torch.linalg.pinv(spread_RR, hermitian=True).flatten()
            @ (mean_NR.T @ (self.p_N[:, None] * mean_NR)).flatten()
        )


def cube(dimensions: int) -> Tensor:
    """All points of {-1, 1}^D, float64 [2^D D], in the order of the tables below."""
    sides = [torch.tensor([-1.0, 1.0], dtype=torch.float64)] * dimensions
    return torch.cartesian_prod(*sides).view(-1, dimensions)


def masked_cube(dimensions: int, rate: float, flip: float = 0.0) -> AugmentationTable:
    """Uniform points of {-1, 1}^D; each coordinate is masked with probability `rate`, and else flipped with `flip`."""
    _require_small(dimensions)
    require_in("[0, 1]", rate=rate, flip=flip)
    return _uniform(_product([_coordinate(rate, flip)] * dimensions))


def block_masked_cube(dimensions: int, ratio: float) -> AugmentationTable:
    """The same with a block of round(ratio D) neighbouring coordinates masked, which begins anywhere, in a ring."""
    _require_small(dimensions)
    require_in("[0, 1]", ratio=ratio)
    width = round(ratio * dimensions)
    starts = (_product([_coordinate(float((i - start) % dimensions < width), 0.0) for i in range(dimensions)])
              for start in range(dimensions))  # fmt: skip
    return _uniform(sum(starts, start=torch.zeros(())) / dimensions)


def masked_complexity(dimensions: int, rate: float, flip: float = 0.0) -> float:
    """kappa^2 of `masked_cube`: (rate + 2 (1 - rate) ((1 - flip)^2 + flip^2))^D."""
    return (rate + 2 * (1 - rate) * ((1 - flip) ** 2 + flip**2)) ** dimensions


def block_complexity(dimensions: int, ratio: float) -> float:
    """kappa^2 of `block_masked_cube`: 2^(D - round(ratio D))."""
    return 2.0 ** (dimensions - round(ratio * dimensions))


def masked_spectrum(dimensions: int, rate: float) -> list[float]:
    """Eigenvalues of `masked_cube` without flips, descending: (1 - rate)^|S| for the parity of each set S."""
    return [(1 - rate) ** k for k in range(dimensions + 1) for _ in range(math.comb(dimensions, k))]


def _coordinate(rate: float, flip: float) -> Tensor:
    """p(outcome | value) [2 3]: -1, masked, 1."""
    kept, turned = (1 - rate) * (1 - flip), (1 - rate) * flip
    return torch.tensor([[kept, rate, turned], [turned, rate, kept]], dtype=torch.float64)


def _product(parts: list[Tensor]) -> Tensor:
    return reduce(torch.kron, parts)


def _uniform(given_NA: Tensor) -> AugmentationTable:
    return AugmentationTable(given_NA, torch.full((len(given_NA),), 1 / len(given_NA), dtype=torch.float64))


def _require_small(dimensions: int) -> None:
    require_in("[1, inf)", dimensions=dimensions)
    require_numbers(6.0**dimensions, dimensions=dimensions)
