"""How much a row of a matrix can matter to |A x|_p^p: leverage, Lewis weights and lp sensitivities.

    sensitivity   sigma_i = max_x |a_i x|^p / |A x|_p^p = 1 / min { |A x|_p^p : a_i x = 1 }
    leverage      tau_i = |Q_i|^2 of A = Q R, which is sigma_i at p = 2
    Lewis weight  w_i = tau_i of diag(w)^(1/2 - 1/p) A

Source: Woodruff, Yasuda, "Sharper Bounds for lp Sensitivity Sampling", ICML 2023, arXiv 2306.00732: the definitions,
the scores by which rows are sampled (uniform, sensitivities, root leverage tau^(p/2) for p < 2, and its sum with
sensitivities for p > 2, here without the flattening of heavy rows that its proof takes first), and the bounds on the
sum of sensitivities, d for p <= 2 and d^(p/2) above. That sigma + tau serves p in [1, 2] is of a later paper (arXiv
2406.00328). They prescribe no way to compute sigma; here it is by iteratively reweighted least squares over the x with
a_i x = 1, which are all feasible, so that what comes out is never above the sensitivity.
Matrices without full rank are taken in their column space, and rows of zeros have scores of 0.

Shapes: N rows, D columns, R their rank, M rows of which a norm is taken, B rows at a time.
"""

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.evaluation.scale import scaled
from lightspan.subspaces.svd import thin_svd

P_RANGE = "[1, 8]"
MOST_WORK = 1e13
"""Products that sensitivities may take, about an hour of one core."""
TOLERANCE = 1e-9
RESIDUAL_FLOOR = 1e-8


def in_column_space(x_ND: Tensor) -> Tensor:
    """Orthonormal columns of the same span in float64, [N R]: A x for all x is the same set of vectors.

    Raises: UserError for numbers that are not finite, and for a matrix of zeros or without rows or columns.
    """
    if x_ND.ndim != 2 or not x_ND.numel():
        raise UserError(f"scores of rows need a matrix [N, D] with a row and a column, not {list(x_ND.shape)}")
    if not x_ND.isfinite().all():
        raise UserError("scores of rows need finite numbers; some features are NaN or infinite")
    left_NK, values_K, _ = thin_svd(scaled(x_ND)[1][0])
    rank = int((values_K > values_K[0] * max(x_ND.shape) * torch.finfo(torch.float64).eps).sum())
    if not rank:
        raise UserError("scores of rows need a number other than zero; all features are 0")
    return left_NK[:, :rank]


def leverage_scores(u_NR: Tensor) -> Tensor:
    """tau, float64 [N] in [0, 1], with a sum of R, of rows in their column space."""
    return u_NR.square().sum(dim=1)


def root_leverage(u_NR: Tensor, p: float) -> Tensor:
    """tau^(p/2), float64 [N]."""
    return leverage_scores(u_NR).pow(p / 2)


def lewis_weights(u_NR: Tensor, p: float, iterations: int = 60) -> Tensor:
    """w, float64 [N], with a sum of R: by the fixed-point iteration of Cohen and Peng, which contracts for p < 4.

    Raises: UserError for another p.
    """
    require_in("[1, 4)", p=p)
    weight_N = leverage_scores(u_NR)
    for _ in range(iterations):
        powered_N = torch.where(weight_N > 0, weight_N.clamp_min(1e-300).pow(1 - 2 / p), 0)
        inverse_RR = torch.linalg.pinv(u_NR.T @ (powered_N[:, None] * u_NR), hermitian=True)
        weight_N = ((u_NR @ inverse_RR) * u_NR).sum(dim=1).clamp_min(0).pow(p / 2)
    return weight_N


def lp_sensitivities(
    u_NR: Tensor, p: float, against_MR: Tensor | None = None, steps: int = 200, numbers: int = 2**24
) -> Tensor:
    """sigma, float64 [N] in [0, 1]: exact at p = 2, and never above the true one elsewhere.

    Args:
        u_NR: rows in their column space.
        p: in [1, 8].
        against_MR: rows of which the norm is taken, already scaled by their weights^(1/p), in the same coordinates: a
            coreset of a matrix that is too long. Then they may be above those of the matrix. None is the matrix itself.
        steps: of reweighting, at most; a row is done when its norm falls by less than 1e-9 of itself.
        numbers: that are in memory at once.
    Raises: UserError for what would take more than `MOST_WORK`.
    """
    require_in(P_RANGE, p=p)
    against_MR = u_NR if against_MR is None else against_MR
    if p == 2 and against_MR is u_NR:
        return leverage_scores(u_NR)
    (count, rank), most = u_NR.shape, len(against_MR)
    if (work := count * most * rank**2 * steps) > MOST_WORK:
        raise UserError(
            f"lp sensitivities of {count:,} rows of rank {rank} against {most:,} would take {work:.1e} products, above "
            f"{MOST_WORK:.0e}; lower `components` or `against`, or take the rule lewis or root_leverage"
        )
    sigma_N = torch.zeros(count, dtype=torch.float64)
    rows = leverage_scores(u_NR).sqrt()  # each row at length 1: a row of 1e-9 has the same problem as one of 1
    for part in rows.nonzero()[:, 0].split(max(1, numbers // (most * rank))):
        unit_BR = u_NR[part] / rows[part, None]
        sigma_N[part] = _inverse_of_least_norm(unit_BR, against_MR, p, steps) * rows[part].pow(p)
    return sigma_N.clamp(max=1.0) if against_MR is u_NR else sigma_N


def _inverse_of_least_norm(row_BR: Tensor, against_MR: Tensor, p: float, steps: int) -> Tensor:
    """1 / min { |A x|_p^p : a x = 1 } for each row a, [B]."""
    x_BR = _weighted(row_BR, against_MR, torch.ones(len(row_BR), len(against_MR), dtype=torch.float64))
    least_B = _norm(x_BR, against_MR, p)
    going_B = torch.ones(len(row_BR), dtype=torch.bool)
    for step in range(steps):
        place_b = going_B.nonzero()[:, 0]
        if not len(place_b):
            break
        residual_bM = (x_BR[place_b] @ against_MR.T).abs()
        # A floor that falls keeps early weights from freezing residuals that only happen to be small.
        floor = max(RESIDUAL_FLOOR, 0.5**step)
        size_b1 = residual_bM.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        weight_bM = (residual_bM / size_b1).square().add(floor**2).pow((p - 2) / 2)
        moved_bR = _weighted(row_BR[place_b], against_MR, weight_bM) - x_BR[place_b]
        x_bR = x_BR[place_b] + moved_bR / max(1.0, p - 1)  # which damps for p > 2, where full steps may overshoot
        norm_b = _norm(x_bR, against_MR, p)
        x_BR[place_b] = x_bR
        going_B[place_b] = ((least_B[place_b] - norm_b) > TOLERANCE * norm_b) | (floor > RESIDUAL_FLOOR)
        least_B[place_b] = torch.minimum(least_B[place_b], norm_b)
    return 1 / least_B


def _norm(x_BR: Tensor, against_MR: Tensor, p: float) -> Tensor:
    return (x_BR @ against_MR.T).abs().pow(p).sum(dim=1)


def _weighted(row_BR: Tensor, against_MR: Tensor, weight_BM: Tensor) -> Tensor:
    """The x with a x = 1 of the least sum of weighted squares of A x, for each row a: [B R]."""
    gram_BRR = torch.einsum("bm,mr,ms->brs", weight_BM, against_MR, against_MR)
    solved_BR = torch.linalg.lstsq(gram_BRR, row_BR[..., None], driver="gelsd").solution[..., 0]
    return solved_BR / (row_BR * solved_BR).sum(dim=1, keepdim=True)
