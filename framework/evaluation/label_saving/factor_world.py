"""A world of which everything is known, and the exact risk of any linear predictor in it.

    x = B z + e,   z ~ N(0, I_R),   e ~ N(0, I_D),   y = beta' z + nu,   nu ~ N(0, noise^2)

Source: Ge, Tang, Fan, Jin, "On the Provable Advantage of Unsupervised Pretraining", ICLR 2024, arXiv 2303.01566, the
factor model. With S = B B' + I the best predictor is w* = S^-1 B beta, and excess(w) = (w - w*)' S (w - w*): no test
samples are needed. In the control the labels tell of e along a direction orthogonal to B, y = |beta| u' e + nu: nothing
that a factor model keeps.
Shapes: N samples, D values, R factors.
"""

from typing import Self

import torch
from torch import Tensor

from lightspan.core.ranges import require_in
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore


class FactorWorld(Input):
    """Orthogonal columns of B of one length, and beta on the unit sphere, both drawn from a seed.

    Args:
        dimensions: D, above R.
        factors: R, at least 1.
        length: of the columns of B, above 0.
        noise: standard deviation of nu, at least 0.
    Raises: UserError for values out of range.
    """

    def __init__(self, dimensions: int = 50, factors: int = 3, length: float = 2.0, noise: float = 1.0) -> None:
        require_in("[1, inf)", factors=factors)
        require_in(f"[{factors + 1}, inf)", dimensions=dimensions)
        require_in("(0, inf)", length=length)
        require_in("[0, inf)", noise=noise)
        self.dimensions, self.factors, self.length, self.noise = dimensions, factors, length, noise

    def load(self, store: FeatureStore) -> Self:
        return self

    def outlook(self, store: FeatureStore) -> str:
        return f"{self.factors} factors in {self.dimensions} dimensions"

    def drawn(self, generator: torch.Generator, control: bool = False) -> "Truth":
        """One such world."""
        frame = torch.linalg.qr(
            torch.randn(self.dimensions, self.factors + 1, generator=generator, dtype=torch.float64)
        )
        beta_R = torch.randn(self.factors, generator=generator, dtype=torch.float64)
        aside_D = frame.Q[:, self.factors] if control else None
        return Truth(self.length * frame.Q[:, : self.factors], beta_R / beta_R.norm(), self.noise, aside_D)


class Truth:
    """A drawn world.

    Attributes:
        factors_DR: B.
        covariance_DD: S.
        best_D: w*.
        floor: the risk of w*, what no predictor is below: var(y) - w*' S w*.
    """

    def __init__(self, factors_DR: Tensor, beta_R: Tensor, noise: float, aside_D: Tensor | None) -> None:
        self.factors_DR, self._beta_R, self._noise, self._aside_D = factors_DR, beta_R, noise, aside_D
        self.covariance_DD = factors_DR @ factors_DR.T + torch.eye(len(factors_DR), dtype=torch.float64)
        with_label_D = factors_DR @ beta_R if aside_D is None else aside_D
        self.best_D = torch.linalg.solve(self.covariance_DD, with_label_D)
        self.floor = 1 + noise**2 - float(self.best_D @ with_label_D)

    def samples(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(x [N D], y [N])."""
        width, rank = self.factors_DR.shape
        z_NR, e_ND = (torch.randn(count, size, generator=generator, dtype=torch.float64) for size in (rank, width))
        nu_N = self._noise * torch.randn(count, generator=generator, dtype=torch.float64)
        told_N = z_NR @ self._beta_R if self._aside_D is None else e_ND @ self._aside_D
        return z_NR @ self.factors_DR.T + e_ND, told_N + nu_N

    def excess(self, weight_D: Tensor) -> float:
        """Squared error of x' w beyond the best one's."""
        apart_D = weight_D - self.best_D
        return float(apart_D @ self.covariance_DD @ apart_D)


def least_squares(x_NR: Tensor, y_N: Tensor, penalty: float = 0.0) -> Tensor:
    """w [R] of the least |X w - y|^2 + penalty |w|^2, the shortest of equal ones. Means are 0 here, and known to be."""
    values_R, vectors_RR = torch.linalg.eigh(x_NR.T @ x_NR)
    kept_R = values_R + penalty > 1e-10 * values_R[-1]
    inverse_R = torch.where(kept_R, 1 / torch.where(kept_R, values_R + penalty, 1), 0)
    return vectors_RR @ (inverse_R * (vectors_RR.T @ (x_NR.T @ y_N)))
