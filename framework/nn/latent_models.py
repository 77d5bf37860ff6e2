"""Latent-variable models fitted to samples without labels by maximum likelihood, as encoders: their posteriors are
features.

- A factor model, x = mean + B z + e with z ~ N(0, I) and e ~ N(0, s^2 I): probabilistic PCA, whose likelihood has its
  maximum in closed form (Tipping, Bishop, "Probabilistic Principal Component Analysis", 1999, equations 7 and 8; with a
  known s^2 negative excesses are 0). Its features are the posterior mean E[z | x].
- A mixture of Gaussians with one variance in all directions, by expectation and maximisation from several starts. Its
  features are the posterior probabilities of the components.
- Ge, Tang, Fan, Jin, "On the Provable Advantage of Unsupervised Pretraining", ICLR 2024, arXiv 2303.01566: a head on
  such features needs labels for R or K directions in place of D.

`learn` fits a model, and has to come first. Everything is computed in float64.
Shapes: N samples, B of a batch, D values, R factors, K components.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in


def fitted_factors(covariance_DD: Tensor, rank: int, variance: float | None = None) -> tuple[Tensor, float]:
    """(B [D R], s^2) of the largest likelihood; B is unique up to a rotation of its columns.

    Args:
        covariance_DD: over N, not N - 1, of samples about their mean, or about 0 if that is known.
        rank: R, in [0, D].
        variance: s^2 if it is known, above 0; None takes the mean of the eigenvalues that are left over, which is 0
            where none is.
    """
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD.double())
    return _factors(values_D.flip(0), vectors_DD.flip(1), rank, variance)


def factors_of_rows(centred_ND: Tensor, rank: int, variance: float | None = None) -> tuple[Tensor, float]:
    """`fitted_factors` of the covariance of rows: O(N D min(N, D)), where an eigendecomposition is O(D^3)."""
    count, width = centred_ND.shape
    if count >= width:
        return fitted_factors(centred_ND.T @ centred_ND / count, rank, variance)
    _, lengths_N, rows_ND = torch.linalg.svd(centred_ND.double(), full_matrices=False)
    values_D = torch.cat([lengths_N.square() / count, lengths_N.new_zeros(width - count)])
    return _factors(values_D, torch.cat([rows_ND, rows_ND.new_zeros(max(0, rank - count), width)]).T, rank, variance)


def _factors(values_D: Tensor, vectors_DE: Tensor, rank: int, variance: float | None) -> tuple[Tensor, float]:
    """From eigenvalues, the largest first, and at least the first `rank` eigenvectors, of which those of 0 are free."""
    rest = values_D[rank:].clamp_min(0)
    s2 = variance if variance is not None else float(rest.mean()) if len(rest) else 0.0
    return vectors_DE[:, :rank] * (values_D[:rank] - s2).clamp_min(0).sqrt(), s2


def factor_likelihood(covariance_DD: Tensor, factors_DR: Tensor, variance: float) -> Tensor:
    """Mean log-likelihood of a sample in nats, a scalar, of samples whose mean is that of the model.

    Args:
        variance: s^2, above 0.
    """
    count = len(covariance_DD)
    model_DD = factors_DR @ factors_DR.T + variance * torch.eye(count, dtype=factors_DR.dtype)
    lower_DD = torch.linalg.cholesky(model_DD)
    half_log_det = lower_DD.diagonal().log().sum()
    return -(count * math.log(2 * math.pi) + torch.cholesky_solve(covariance_DD, lower_DD).trace()) / 2 - half_log_det


def posterior_map(factors_DR: Tensor, variance: float) -> Tensor:
    """W [D R] with E[z | x] = (x - mean) W: (B B' + s^2 I)^-1 B = B (B' B + s^2 I)^-1.

    A column of B that is 0 has features of 0, also for a variance of 0.
    """
    small_RR = factors_DR.T @ factors_DR + variance * torch.eye(factors_DR.shape[1], dtype=factors_DR.dtype)
    return factors_DR @ torch.linalg.pinv(small_RR, hermitian=True)


class _Latent(nn.Module):
    """What both share: samples in, of any shape, as rows in float64."""

    mean_D: Tensor | None

    def _rows(self, batches: Iterable[Tensor], least: int) -> Tensor:
        rows = [batch.detach().cpu().double().flatten(1) for batch in batches]
        x_ND = torch.cat(rows) if rows else torch.zeros(0, 1, dtype=torch.float64)
        name = type(self).__name__
        if len(x_ND) < least:
            raise UserError(f"{name} learns from at least {least} samples, and got {len(x_ND)}")
        if not x_ND.isfinite().all():
            raise UserError(f"{name} got samples that are NaN or infinite; leave them out")
        return x_ND

    def _given(self, x: Tensor, width: int | None) -> Tensor:
        x_BD = x.flatten(1).double()
        if width != x_BD.shape[1]:
            has = "has not learned" if width is None else f"learned from samples of {width} values"
            raise UserError(
                f"{type(self).__name__} {has} and got {x_BD.shape[1]}; call learn with training samples, or name it "
                "among the encoders of lightspan.evaluation.features.compared.ComparedEncoders, which does"
            )
        return x_BD


class FactorModel(_Latent):
    """[B ...] -> [B R]: posterior means of a factor model; a factor with no more variance than noise is 0.

    Args:
        rank: R, at least 1, and at most D where it learns.
        variance: s^2 of the noise if it is known, above 0.
    Attributes:
        num_features: R.
    """

    factors_DR: Tensor | None

    def __init__(self, rank: int, variance: float | None = None) -> None:
        super().__init__()
        require_in("[1, inf)", rank=rank)
        require_in("(0, inf)", variance=variance)
        self.rank, self.variance, self.num_features = rank, variance, rank
        for name in ("mean_D", "factors_DR", "map_DR"):
            self.register_buffer(name, None)

    @torch.no_grad()
    def learn(self, batches: Iterable[Tensor]) -> None:
        """Raises: UserError for fewer than 2 samples, fewer values than factors, or samples that are not finite."""
        x_ND = self._rows(batches, 2)
        if self.rank > x_ND.shape[1]:
            raise UserError(f"FactorModel rank={self.rank} must be at most {x_ND.shape[1]}, the values of a sample")
        mean_D = x_ND.mean(dim=0)
        factors_DR, s2 = factors_of_rows(x_ND - mean_D, self.rank, self.variance)
        self.mean_D, self.factors_DR, self.map_DR = mean_D, factors_DR, posterior_map(factors_DR, s2)

    def forward(self, x: Tensor) -> Tensor:
        x_BD = self._given(x, None if self.mean_D is None else len(self.mean_D))
        assert self.mean_D is not None
        return ((x_BD - self.mean_D) @ self.map_DR).to(torch.promote_types(x.dtype, torch.float32))


class GaussianMixture(_Latent):
    """[B ...] -> [B K]: posterior probabilities of the components of a mixture, which add to 1.

    Expectation and maximisation find a local maximum of the likelihood; the best of several starts is kept. A start
    takes K different samples as centres, each with a probability that grows with its squared distance to those before.

    Args:
        components: K, at least 1.
        variance: in every direction if it is known, above 0; None learns it.
        starts: at least 1; ten or more, for one alone is often a poor maximum.
        iterations: of each start, at least 1.
        seed: of the starts.
    Attributes:
        num_features: K.
        likelihoods: mean log-likelihood of a sample in nats that each start reached, after `learn`.
    """

    mean_KD: Tensor | None

    def __init__(
        self, components: int, variance: float | None = None, starts: int = 10, iterations: int = 100, seed: int = 0
    ) -> None:
        super().__init__()
        require_in("[1, inf)", components=components, starts=starts, iterations=iterations)
        require_in("[0, inf)", seed=seed)
        require_in("(0, inf)", variance=variance)
        self.components, self.variance, self.num_features = components, variance, components
        self.starts, self.iterations, self.seed = starts, iterations, seed
        self.likelihoods: tuple[float, ...] = ()
        for name in ("mean_KD", "log_share_K", "s2"):
            self.register_buffer(name, None)

    @torch.no_grad()
    def learn(self, batches: Iterable[Tensor]) -> None:
        """Raises: UserError for fewer samples than components, or ones that are not finite."""
        x_ND = self._rows(batches, self.components)
        generator = torch.Generator().manual_seed(self.seed)
        found = [self._started(x_ND, generator) for _ in range(self.starts)]
        self.likelihoods = tuple(likelihood for likelihood, *_ in found)
        _, self.mean_KD, self.log_share_K, self.s2 = max(found, key=lambda one: one[0])

    def forward(self, x: Tensor) -> Tensor:
        x_BD = self._given(x, None if self.mean_KD is None else self.mean_KD.shape[1])
        joint_BK = _log_joint(x_BD, self.mean_KD, self.log_share_K, self.s2)  # type: ignore[arg-type]
        return joint_BK.softmax(dim=1).to(torch.promote_types(x.dtype, torch.float32))

    def _started(self, x_ND: Tensor, generator: torch.Generator) -> tuple[float, Tensor, Tensor, Tensor]:
        """(mean log-likelihood, means, log shares, variance)."""
        mean_KD = _far_apart(x_ND, self.components, generator)
        log_share_K = x_ND.new_full((self.components,), -math.log(self.components))
        whole = (x_ND - x_ND.mean(dim=0)).square().mean()
        # A variance of 0 has an infinite likelihood, as where there are as many components as samples.
        least = float(whole) * 1e-6 or 1.0
        s2 = x_ND.new_tensor(self.variance) if self.variance is not None else whole.clamp_min(least)
        before = -math.inf
        for _ in range(self.iterations):
            joint_NK = _log_joint(x_ND, mean_KD, log_share_K, s2)
            likelihood = float(joint_NK.logsumexp(dim=1).mean())
            if likelihood - before <= 1e-8 * abs(likelihood):
                break
            before, share_NK = likelihood, joint_NK.softmax(dim=1)
            weight_K = share_NK.sum(dim=0)
            here_K1 = (weight_K > 1e-12)[:, None]  # a component that nothing belongs to stays where it is
            mean_KD = torch.where(here_K1, share_NK.T @ x_ND / weight_K.clamp_min(1e-12)[:, None], mean_KD)
            log_share_K = (weight_K / len(x_ND)).clamp_min(1e-300).log()
            if self.variance is None:
                s2 = (share_NK * _squares(x_ND, mean_KD)).sum() / x_ND.numel()
                s2 = s2.clamp_min(least)
        likelihood = float(_log_joint(x_ND, mean_KD, log_share_K, s2).logsumexp(dim=1).mean())
        return likelihood, mean_KD, log_share_K, s2


def _far_apart(x_ND: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The centres of a start, as k-means++ draws them, [K D]."""
    chosen = [int(torch.randint(len(x_ND), (), generator=generator))]
    far_N = _squares(x_ND, x_ND[chosen])[:, 0]
    for _ in range(count - 1):
        # Where all samples are centres already, any one will do.
        weight_N = far_N if float(far_N.sum()) > 0 else torch.ones_like(far_N)
        chosen.append(int(torch.multinomial(weight_N, 1, generator=generator)))
        far_N = torch.minimum(far_N, _squares(x_ND, x_ND[chosen[-1:]])[:, 0])
    return x_ND[chosen]


def _squares(x_ND: Tensor, mean_KD: Tensor) -> Tensor:
    """Squared distances [N K], from a point among the means: samples far from the origin lose no digits."""
    origin_D = mean_KD.mean(dim=0)
    x_ND, mean_KD = x_ND - origin_D, mean_KD - origin_D
    square_NK = x_ND.square().sum(dim=1, keepdim=True) + mean_KD.square().sum(dim=1)
    return (square_NK - 2 * x_ND @ mean_KD.T).clamp_min(0)


def _log_joint(x_ND: Tensor, mean_KD: Tensor, log_share_K: Tensor, s2: Tensor) -> Tensor:
    """log p(x, component) [N K]."""
    width = x_ND.shape[1]
    return log_share_K - _squares(x_ND, mean_KD) / (2 * s2) - width / 2 * (2 * math.pi * s2).log()
