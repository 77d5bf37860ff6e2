"""From scores to rows and counts: independent draws that meet a number, and counts that meet a budget exactly.

Shapes: N rows, T parts of a budget.
"""

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError


def inclusion(score_N: Tensor, rows: float) -> Tensor:
    """q = min(1, s / alpha), float64 [N], with alpha such that the q add up to `rows`.

    Scores that are so heavy that q is 1 take a row each, and the others share what is left of `rows`, which is why
    alpha is found by bisection.

    Args:
        score_N: at least 0 and finite.
        rows: above 0, at most the number of scores above 0.
    Raises: UserError for scores and rows out of these ranges.
    """
    score_N = score_N.double()
    if not score_N.isfinite().all() or (score_N < 0).any():
        raise UserError("scores of rows must be finite and at least 0")
    some = int((score_N > 0).sum())
    if not 0 < rows <= some:
        raise UserError(
            f"rows={rows:g} cannot be drawn of {len(score_N):,} rows, of which {some:,} have a score above 0; it must "
            f"lie in (0, {some}]"
        )
    if rows == some:
        return (score_N > 0).double()
    low, high = torch.tensor(0.0, dtype=torch.float64), score_N.sum() / rows  # at `high` the sum is at most `rows`
    for _ in range(200):
        alpha = (low + high) / 2
        if not low < alpha < high:
            break
        low, high = (low, alpha) if (score_N / alpha).clamp(max=1).sum() <= rows else (alpha, high)
    return (score_N / high).clamp(max=1)


def bernoulli(chance_N: Tensor, seed: int) -> Tensor:
    """Which rows are drawn, each by itself with its chance: places in ascending order, int64 [n]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(len(chance_N), generator=generator, dtype=torch.float64) < chance_N.cpu()).nonzero()[:, 0]


def allocated(score_T: np.ndarray, budget: int, floor: int = 0, most_T: np.ndarray | None = None) -> np.ndarray:
    """Counts in proportion to scores, int64 [T] with the sum `budget`, none below `floor` or above what there is.

        n_t = min(most_t, max(floor, beta s_t)), beta such that they add up, and largest remainders for whole numbers

    Args:
        score_T: at least 0 and finite; all 0 counts as all equal.
        most_T: int64 [T]; None is without limit.
    Raises: UserError for scores out of range, and a budget that the floors exceed, or that is more than there is.
    """
    if not len(score_T) or not np.isfinite(score_T).all() or (score_T < 0).any():
        raise UserError("scores of a budget must be finite and at least 0, and there must be one")
    most_T = np.full(len(score_T), budget) if most_T is None else np.minimum(most_T, budget)
    floor_T = np.minimum(floor, most_T)
    if floor_T.sum() > budget or floor < 0:
        raise UserError(
            f"budget={budget} is less than the floor={floor} of each of {len(score_T)} parts takes, {floor_T.sum()}; "
            "raise it or lower floor, which must be at least 0"
        )
    if most_T.sum() < budget:
        raise UserError(f"budget={budget} is more than the {most_T.sum()} rows that there are; lower it")
    score_T = np.ones(len(score_T)) if not score_T.any() else score_T / score_T.max()
    # What scores of 0 get beyond their floors when all others are full.
    score_T = np.maximum(score_T, 1e-12)

    def at(beta: float) -> np.ndarray:
        return np.clip(beta * score_T, floor_T, most_T)

    low, high = 0.0, float((most_T / score_T).max())
    for _ in range(200):
        beta = (low + high) / 2
        low, high = (beta, high) if at(beta).sum() < budget else (low, beta)
    exact_T = at(high)
    count_T = np.floor(exact_T + 1e-9).astype(np.int64)
    rest_T = np.where(count_T < most_T, exact_T - count_T, -1)
    count_T[np.argsort(-rest_T, kind="stable")[: budget - count_T.sum()]] += 1
    return count_T
