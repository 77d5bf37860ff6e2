"""Signs that features collapse: measures of samples, of their views and of their assignments to prototypes.

Pure functions on any device, in float32 or wider. None depends on the scale of its rows but `length`, whose unit is
theirs. None raises on what a network may give while it trains: a constant sample is ordinary, rows of zeros stay zeros
where rows are divided by their length, and a number that is not finite gives NaN.
Sources: Garrido et al., "RankMe" (2210.02885), equations 1 and 2; Thilak et al., "LiDAR" (2312.04000), section 3;
Wang, Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere"
(2005.10242), section 4; Chen, He, "Exploring Simple Siamese Representation Learning" (2011.10566), section 4.1.
Shapes: N samples, Q views of each, D features, K prototypes.
"""

import math

import torch
from torch import Tensor

from lightspan.core.devices import wide_type, widest_float
from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.spectra import singular_values
from lightspan.evaluation.rows import unit_rows
from lightspan.evaluation.scale import scaled


def rankme(x_ND: Tensor, epsilon: float = 1e-7) -> float:
    """RankMe: exp of the entropy of p_k = sigma_k / |sigma|_1 + epsilon, the singular values sigma not centred.

    About r for r equal singular values, about 1 for equal rows, and 0 for zeros, of which the paper says nothing. At
    most min(N, D), up to epsilon: take several times as many samples as the dimensions you want to tell apart.

    Args:
        epsilon: the paper's, for float32.
    Raises: UserError for no row or no feature.
    """
    _require_rows("RankMe", x_ND, 1)
    _, (near_one_ND,) = scaled(x_ND)
    return _smooth_rank(singular_values(near_one_ND.to(wide_type(x_ND.dtype))), epsilon)


def lidar(x_NQD: Tensor, delta: float = 1e-4, epsilon: float = 1e-7) -> float:
    """LiDAR: the smooth rank, as of RankMe, of Sigma_w^(-1/2) Sigma_b Sigma_w^(-1/2) (section 3, equations 1 to 3).

    Each sample is a class, its views are the class's points: Sigma_b is the covariance of the samples' means, Sigma_w
    the mean covariance of views around their sample's mean, plus delta m I. At most N - 1: the paper takes 1,000
    samples of 50 views and more. Covariances are means, not corrected for the mean that was subtracted.

    It differs from the paper in m, which is 1 there: here it is the mean of the variances of all features over all
    points, the trace of Sigma_b + Sigma_w over D, so that neither figure nor rounding depends on the scale of the
    features. On features of variance 1 both agree. If no view differs from the others, Sigma_w is a multiple of I, and
    this is the smooth rank of Sigma_b. Unverified: the values of delta and epsilon, which are those of public
    implementations.

    Args:
        x_NQD: row i holds the views of one sample. N >= 2, Q >= 2.
        delta: > 0, a share of the mean variance.
    Returns: 0 if all samples have the same mean.
    Raises: UserError for fewer samples or views, no feature, or delta that is not above 0.
    """
    _require_rows("LiDAR", x_NQD, 2)
    if x_NQD.ndim != 3 or x_NQD.shape[1] < 2:
        raise UserError(f"LiDAR needs features [samples, views >= 2, D], but got {list(x_NQD.shape)}")
    if delta <= 0:
        raise UserError(f"LiDAR delta={delta} must be above 0: without it Sigma_w may have no inverse")
    if not x_NQD.isfinite().all():
        return math.nan
    features = x_NQD.shape[2]
    _, (x_NQD,) = scaled(x_NQD)
    x_NQD = x_NQD - x_NQD[:1, :1]  # equal rows are exactly zero from here on
    if features > (points := len(x_NQD) * x_NQD.shape[1]):
        # In a basis of the points' span, which changes no distance, matrices are as small as there are points.
        x_NQD = torch.linalg.qr(x_NQD.flatten(0, 1).T, mode="r").R.T.reshape(*x_NQD.shape[:2], points)
    mean_N1D = x_NQD.mean(dim=1, keepdim=True)
    apart_ND = (mean_N1D - mean_N1D.mean(dim=0)).squeeze(1)
    around_MD = (x_NQD - mean_N1D).flatten(0, 1) / math.sqrt(len(x_NQD) * x_NQD.shape[1])
    variance = (apart_ND.square().sum() / len(apart_ND) + around_MD.square().sum()) / features
    if variance == 0:
        return 0.0
    # The triangle R of [A; sqrt(delta m) I] has R^T R = Sigma_w. Unlike Cholesky's of Sigma_w it exists whatever the
    # rounding. Sigma_b is B^T B / N, so the eigenvalues are the squared singular values of B R^(-1), up to a factor.
    floor_DD = torch.eye(x_NQD.shape[2], dtype=x_NQD.dtype, device=x_NQD.device) * (delta * variance).sqrt()
    root_DD = torch.linalg.qr(torch.cat([around_MD, floor_DD]), mode="r").R
    whitened_ND = torch.linalg.solve_triangular(root_DD, apart_ND, upper=True, left=False)
    return _smooth_rank(singular_values(whitened_ND).square(), epsilon)


def uniformity(x_ND: Tensor, t: float = 2.0) -> float:
    """log of the mean of exp(-t |u_i - u_j|^2) over pairs of different samples, u being rows of length one.

    In [-4t, 0]: 0 if all samples agree, about -t * 2 if directions are independent in many dimensions.

    Raises: UserError for fewer than two rows.
    """
    _require_rows("uniformity", x_ND, 2)
    squares = torch.pdist(unit_rows(x_ND)).square()
    return (torch.logsumexp(-t * squares, dim=0) - math.log(len(squares))).item()


def alignment(x_NQD: Tensor) -> float:
    """Mean of |u - v|^2 over pairs of views of one sample, of length one each; in [0, 4], 0 if the views agree.

    Raises: UserError for fewer than two views.
    """
    _require_rows("alignment", x_NQD, 1)
    if x_NQD.ndim != 3 or (views := x_NQD.shape[1]) < 2:
        raise UserError(f"alignment needs features [samples, views >= 2, D], but got {list(x_NQD.shape)}")
    one, other = torch.triu_indices(views, views, 1, device=x_NQD.device)
    u_NQD = unit_rows(x_NQD)
    return (u_NQD[:, one] - u_NQD[:, other]).square().sum(dim=2).mean().item()


def length(x_ND: Tensor) -> float:
    """Mean length of the rows, in their unit. Raises: UserError for no row or no feature."""
    _require_rows("length", x_ND, 1)
    return torch.linalg.vector_norm(_widest(x_ND), dim=1).mean().item()


def spread(x_ND: Tensor) -> float:
    """Standard deviation of each feature over rows of length one, its mean over features times sqrt(D).

    In [0, 1]: 0 if all rows have one direction, about 1 if directions fill the sphere evenly.

    Raises: UserError for no row or no feature.
    """
    _require_rows("spread", x_ND, 1)
    u_ND = _widest(unit_rows(x_ND))
    return ((u_ND - u_ND[:1]).std(dim=0, correction=0).mean() * math.sqrt(u_ND.shape[1])).item()


def dead_dimensions(x_ND: Tensor, relative: float = 1e-6) -> float:
    """Share of features whose standard deviation is at most `relative` times the largest number, in [0, 1].

    Raises: UserError for no row or no feature.
    """
    _require_rows("dead dimensions", x_ND, 1)
    if not x_ND.isfinite().all():
        return math.nan
    x_ND = _widest(x_ND)
    deviation_D = (x_ND - x_ND[:1]).std(dim=0, correction=0)
    return (deviation_D <= relative * x_ND.abs().max()).double().mean().item()


def duplicates(x_ND: Tensor, tolerance: float = 1e-3) -> float:
    """Share of rows u of length one that are the same as another one, in [0, 1].

    The same is what is nearer than `tolerance` times the root mean square distance from the mean row, so that rows that
    differ a little in one direction that all share are different; or nearer than 1e-6, which float32 does not resolve.
    Rows of zeros are duplicates of one another. A chunk of rows at a time, so that memory is N * 1024 numbers.

    Raises: UserError for no row or no feature.
    """
    _require_rows("duplicates", x_ND, 1)
    if not x_ND.isfinite().all():
        return math.nan
    u_ND = _widest(unit_rows(x_ND))
    apart = (u_ND - u_ND.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    limit = (tolerance * apart).clamp_min(1e-6)
    found = 0
    for start in range(0, len(u_ND), 1024):
        # Not by the matrix product, whose rounding errors are larger than close distances.
        near = torch.cdist(u_ND[start : start + 1024], u_ND, compute_mode="donot_use_mm_for_euclid_dist") <= limit
        found += int((near.sum(dim=1) > 1).sum())
    return found / len(u_ND)


def prototype_use(assignment_NK: Tensor) -> tuple[float, float]:
    """(prototypes in use, prototypes a sample), both in [1, K]: exp of the entropy of the mean assignment, and exp of
    the mean entropy of assignments. Both are 0 if no row has an entry.

    Sound are many in use and few a sample. The first is 1 if all samples go to one prototype; they are equal, whatever
    their value, if the assignments tell nothing about the samples.

    Args:
        assignment_NK: rows >= 0, which are divided by their sums; a row without any is left out.
    Raises: UserError for no row, no column, or an entry below 0.
    """
    p_NK = _widest(assignment_NK)
    if p_NK.ndim != 2 or not p_NK.numel() or (p_NK < 0).any():
        raise UserError(f"assignments {list(assignment_NK.shape)} must be a row of shares, >= 0, for each sample")
    p_NK = p_NK[p_NK.sum(dim=1) != 0]
    if not len(p_NK):
        return 0.0, 0.0
    p_NK = p_NK / p_NK.sum(dim=1, keepdim=True)
    in_use = torch.special.entr(p_NK.mean(dim=0)).sum().exp()
    a_sample = torch.special.entr(p_NK).sum(dim=1).mean().exp()
    return in_use.item(), a_sample.item()


def _smooth_rank(values_S: Tensor, epsilon: float) -> float:
    total = values_S.sum()
    if total == 0:
        return 0.0
    p_S = values_S / total + epsilon
    return (-(p_S * p_S.log()).sum()).exp().item()  # not entr, which is -inf for numbers below 0


def _widest(x: Tensor) -> Tensor:
    return x.to(widest_float(x.device))


def _require_rows(what: str, x: Tensor, least: int) -> None:
    if x.ndim < 2 or len(x) < least or not x.shape[-1]:
        raise UserError(f"{what} needs at least {least} rows with features, but got {list(x.shape)}")
