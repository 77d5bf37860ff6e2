"""A Gaussian for each class of features: what is kept of classes whose samples are gone, and drawn from later.

Shapes: N rows, F features, C classes, S samples of a class.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightspan.core.distributed import register_replicated
from lightspan.core.errors import UserError
from lightspan.core.noise import hashed_noise, mixed_seed
from lightspan.evaluation.geometry.moments import Moments


class ClassGaussians(nn.Module):
    """Means, and factors of the covariances, of classes that are learned once each.

    Covariances are computed in float64 and factored once; means and factors are kept in float32: C (F + F^2) numbers.

    Args:
        num_classes, num_features: C and F, at least 1.
        jitter: added to each variance, >= 0, since fewer rows than features leave a covariance without full rank.
    Attributes:
        count_C: rows of each class; 0 for one that was not learned.
        mean_CF: their means.
        factor_CFF: lower triangles L, the covariance being L L^T. That of a class of one row is the jitter alone.
    """

    count_C: Tensor
    mean_CF: Tensor
    factor_CFF: Tensor

    def __init__(self, num_classes: int, num_features: int, jitter: float = 1e-4) -> None:
        super().__init__()
        if num_classes < 1 or num_features < 1 or not 0 <= jitter < float("inf"):
            raise UserError(
                f"ClassGaussians num_classes={num_classes} and num_features={num_features} must be at least 1, and "
                f"jitter={jitter} at least 0"
            )
        self.jitter = jitter
        register_replicated(self, "count_C", torch.zeros(num_classes, dtype=torch.int64))
        register_replicated(self, "mean_CF", torch.zeros(num_classes, num_features))
        register_replicated(self, "factor_CFF", torch.zeros(num_classes, num_features, num_features))

    @torch.no_grad()
    def learn(self, number: int, moments: Moments) -> None:
        """Keeps a class. Without rows it stays unknown.

        Args:
            moments: of its rows as one class, those of all ranks.
        Raises: UserError for rows of another width.
        """
        if moments.mean_CD.shape[1] != self.mean_CF.shape[1]:
            raise UserError(
                f"ClassGaussians of {self.mean_CF.shape[1]} features got moments of {moments.mean_CD.shape[1]}"
            )
        if not moments.count:
            return
        covariance_FF = moments.within_DD / max(moments.count - 1, 1)
        covariance_FF.diagonal().add_(self.jitter)
        self.count_C[number] = moments.count
        self.mean_CF[number] = moments.mean_CD[0].to(self.mean_CF)
        self.factor_CFF[number] = factor(covariance_FF).to(self.factor_CFF)

    def known(self) -> list[int]:
        """The classes that were learned, ascending."""
        known: list[int] = self.count_C.nonzero()[:, 0].tolist()
        return known

    def covariance(self, number: int) -> Tensor:
        """[F F], the jitter included."""
        factor_FF = self.factor_CFF[number]
        return factor_FF @ factor_FF.T

    @torch.no_grad()
    def sample(self, number: int, count: int, seeds: Sequence[int], scale: float = 1.0) -> Tensor:
        """Rows [S F] from N(scale * mean, covariance), a function of the class and the seeds alone.

        Args:
            count: S.
            seeds: whole numbers, such as a run's seed and an epoch.
            scale: of the mean.
        """
        of_class = mixed_seed(torch.tensor([number], device=self.mean_CF.device), *seeds)
        noise_SF = hashed_noise(of_class, 0, (count, self.mean_CF.shape[1]))[0].to(self.mean_CF.dtype)
        return scale * self.mean_CF[number] + noise_SF @ self.factor_CFF[number].T


def factor(covariance_FF: Tensor) -> Tensor:
    """L with L L^T = covariance: Cholesky's, or where rounding has made an eigenvalue negative, by eigenvectors."""
    factor_FF, failed = torch.linalg.cholesky_ex(covariance_FF)
    if not int(failed):
        return factor_FF
    values_F, vectors_FF = torch.linalg.eigh(covariance_FF)
    return vectors_FF * values_F.clamp_min(0).sqrt()
