"""How far a weighted sample of rows is from the norm |A x|_p^p of the whole matrix, measured and not assumed.

The guarantees of sampling by sensitivity hold for all x up to constants and logarithms that are large for small
samples. What is measured here is a lower bound on the worst case: over random directions, the axes, the rows
themselves, which are the directions in which single rows matter, regressions, and ascents from the worst of them.

Shapes: N rows, R rank, n drawn rows, C directions.
"""

import torch
from torch import Tensor

from lightspan.core.ranges import require_in

RANDOM = 64
MOST_ROWS = 2048
"""Of the rows that are directions: evenly spaced ones of more."""
CLIMBED = 8
STEPS = 30


def distortion(
    u_NR: Tensor, drawn_n: Tensor, weight_n: Tensor, p: float, more_CR: Tensor | None = None, seed: int = 0
) -> float:
    """max over directions x of | sum_i w_i |a_i x|^p / |A x|_p^p - 1 |: 0 where the sample is the matrix.

    Args:
        u_NR: rows in their column space.
        drawn_n: places of the drawn rows.
        weight_n: of each drawn row, 1 / q.
        p: at least 1.
        more_CR: further directions, such as U^T of the residuals of a regression.
        seed: of the random directions.
    """
    require_in("[1, inf)", p=p)
    generator = torch.Generator().manual_seed(seed)
    rank = u_NR.shape[1]
    spaced = torch.linspace(0, len(u_NR) - 1, min(len(u_NR), MOST_ROWS), dtype=torch.float64).round().long()
    start_CR = [
        torch.randn(RANDOM, rank, generator=generator, dtype=torch.float64),
        torch.eye(rank, dtype=torch.float64),
    ]
    start_CR += [u_NR[spaced]] + ([] if more_CR is None else [more_CR.double()])
    x_CR = torch.cat(start_CR)
    x_CR = x_CR[x_CR.any(dim=1)]
    part_nR, weight_n = u_NR[drawn_n], weight_n.double()
    found_C = _excess(x_CR, u_NR, part_nR, weight_n, p).detach()
    worst = float(found_C.abs().max())
    climbing_CR = x_CR[found_C.abs().argsort(descending=True, stable=True)[:CLIMBED]]
    rate = 0.3
    for _ in range(STEPS):
        climbing_CR = torch.nn.functional.normalize(climbing_CR, dim=1).requires_grad_()
        excess_C = _excess(climbing_CR, u_NR, part_nR, weight_n, p).abs()
        worst = max(worst, float(excess_C.detach().max()))
        (slope_CR,) = torch.autograd.grad(excess_C.sum(), climbing_CR)
        climbing_CR = climbing_CR.detach() + rate * torch.nn.functional.normalize(slope_CR, dim=1)
        rate *= 0.9
    return worst


def _excess(x_CR: Tensor, u_NR: Tensor, part_nR: Tensor, weight_n: Tensor, p: float) -> Tensor:
    whole_C = (x_CR @ u_NR.T).abs().pow(p).sum(dim=1)
    return ((x_CR @ part_nR.T).abs().pow(p) * weight_n).sum(dim=1) / whole_C - 1


def lp_regression(x_NR: Tensor, y_N: Tensor, p: float, weight_N: Tensor | None = None, steps: int = 200) -> Tensor:
    """The b of least sum_i w_i |x_i b - y_i|^p, float64 [R], by iteratively reweighted least squares.

    Args:
        p: in [1, 8].
        weight_N: at least 0; None is 1.
    """
    require_in("[1, 8]", p=p)
    x_NR, y_N = x_NR.double(), y_N.double()
    given_N = torch.ones_like(y_N) if weight_N is None else weight_N.double()
    best_R = solution_R = _least_squares(x_NR, y_N, given_N)
    least = float(((x_NR @ solution_R - y_N).abs().pow(p) * given_N).sum())
    for step in range(steps if p != 2 else 0):
        residual_N = (x_NR @ solution_R - y_N).abs()
        size = residual_N.max()
        if not size:
            break
        floor = max(1e-8, 0.5**step)
        weight = (residual_N / size).square().add(floor**2).pow((p - 2) / 2)
        moved_R = _least_squares(x_NR, y_N, given_N * weight) - solution_R
        solution_R = solution_R + moved_R / max(1.0, p - 1)
        loss = float(((x_NR @ solution_R - y_N).abs().pow(p) * given_N).sum())
        done = floor == 1e-8 and least - loss <= 1e-9 * loss
        if loss < least:
            best_R, least = solution_R, loss
        if done:
            break
    return best_R


def _least_squares(x_NR: Tensor, y_N: Tensor, weight_N: Tensor) -> Tensor:
    root_N1 = weight_N.sqrt()[:, None]
    return torch.linalg.lstsq(root_N1 * x_NR, root_N1 * y_N[:, None], driver="gelsd").solution[:, 0]
