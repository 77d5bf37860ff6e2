"""Which source tasks matter to a target task: heads on one shared subspace, and the target's head as a mix of them.

    y_t = x B w_t + noise            B [D K] with orthonormal columns, one head w_t [K] for each task
    nu  = argmin |nu|_1  with  W nu = w_target,  W [K T] the heads of the sources              (relevance, L1)

Source: Wang, Chen, Jamieson, Du, "Improved Active Multi-Task Representation Learning via Lasso", ICML 2023, arXiv
2306.02556: the model, nu of least L1 norm where W is known and by Lasso where it is estimated, and allocation in
proportion to |nu|. The rule before it (Chen, Jamieson, Du, 2022, arXiv 2202.00911) takes nu of least L2 norm, and
allocation in proportion to its square. Turning B turns W and w_target alike, so that nu does not change.

Shapes: T source tasks, D columns, K dimensions of the subspace, N rows of a task.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from sklearn.linear_model import LassoLars
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.subspaces.svd import thin_svd

SOLVED_AT_ONCE, GRADIENTS = 200, 30
INFEASIBLE = 1e-7
"""Of the length of the target's head: what the sources may leave of it where nu is to give it exactly."""


def least_l1(heads_KT: np.ndarray, target_K: np.ndarray) -> np.ndarray:
    """nu of least L1 norm with W nu = w, float64 [T], by a linear programme: at most K are not 0.

    Raises: UserError for a target outside the span of the sources, of which `lasso_relevance` finds the nearest mix.
    """
    _require_heads(heads_KT, target_K)
    size = float(np.abs(heads_KT).max())
    rest = target_K - heads_KT @ least_l2(heads_KT, target_K)
    if np.linalg.norm(rest) > INFEASIBLE * np.linalg.norm(target_K) or not size:
        raise UserError(
            "the target's head lies outside the span of the sources' heads, so that no mix of them gives it; take the "
            "Lasso, and look at the rest that it leaves"
        )
    sides = np.concatenate([heads_KT, -heads_KT], axis=1) / size
    found = linprog(np.ones(sides.shape[1]), A_eq=sides, b_eq=target_K / size, bounds=(0, None), method="highs-ds")
    assert found.status == 0, found.message
    positive_T, negative_T = np.split(found.x, 2)
    return positive_T - negative_T


def least_l2(heads_KT: np.ndarray, target_K: np.ndarray) -> np.ndarray:
    """pinv(W) w, float64 [T]: nu of least L2 norm."""
    _require_heads(heads_KT, target_K)
    return np.linalg.lstsq(heads_KT, target_K, rcond=None)[0]


def lasso_relevance(heads_KT: np.ndarray, target_K: np.ndarray, strength: float) -> np.ndarray:
    """argmin |W nu - w|^2 / 2 + strength |nu|_1, float64 [T]. Raises: UserError for a strength not above 0."""
    require_in("(0, inf)", strength=strength)
    _require_heads(heads_KT, target_K)
    model = LassoLars(alpha=strength / len(target_K), fit_intercept=False, max_iter=100 * sum(heads_KT.shape))
    return model.fit(heads_KT, target_K).coef_.astype(np.float64)


def _require_heads(heads_KT: np.ndarray, target_K: np.ndarray) -> None:
    if heads_KT.ndim != 2 or not heads_KT.shape[1] or target_K.shape != heads_KT.shape[:1]:
        raise UserError(f"relevance needs heads [K, T] and a target [K], not {heads_KT.shape} and {target_K.shape}")
    if not (np.isfinite(heads_KT).all() and np.isfinite(target_K).all()):
        raise UserError("relevance needs finite heads; some are NaN or infinite")


@dataclass(frozen=True)
class TaskMoments:
    """All that least squares needs to know of tasks: X^T X [T D D], X^T y [T D], |y|^2 [T], rows [T]."""

    gram_TDD: Tensor
    cross_TD: Tensor
    energy_T: Tensor
    rows_T: Tensor

    @classmethod
    def of(cls, tasks: Sequence[tuple[Tensor, Tensor]]) -> "TaskMoments":
        """Of (x [N D], y [N]) of each task. Raises: UserError for no task, a task without rows, numbers not finite."""
        if not tasks or not all(len(x_ND) for x_ND, _ in tasks):
            raise UserError(f"low-rank regression of {len(tasks)} tasks needs at least one, and a row of each")
        if not all(bool(x.isfinite().all() and y.isfinite().all()) for x, y in tasks):
            raise UserError("low-rank regression needs finite features and targets; some are NaN or infinite")
        pairs = [(x.double(), y.double()) for x, y in tasks]
        return cls(
            torch.stack([x.T @ x for x, _ in pairs]),
            torch.stack([x.T @ y for x, y in pairs]),
            torch.stack([y.square().sum() for _, y in pairs]),
            torch.tensor([len(x) for x, _ in pairs], dtype=torch.float64),
        )


@dataclass(frozen=True)
class SharedSubspace:
    """Tasks as regressions on one subspace.

    Attributes:
        basis_DK: orthonormal columns.
        heads_KT: of each task.
        loss: the sum of squares that is left, over all rows.
    """

    basis_DK: Tensor
    heads_KT: Tensor
    loss: float

    def head_of(self, x_ND: Tensor, y_N: Tensor) -> Tensor:
        """That of another task by least squares on the subspace, float64 [K]."""
        solution = torch.linalg.lstsq(x_ND.double() @ self.basis_DK, y_N.double()[:, None], driver="gelsd").solution
        return solution[:, 0]


def shared_subspace(tasks: TaskMoments, rank: int, steps: int = 100, tolerance: float = 1e-7) -> SharedSubspace:
    """min over B and w_t of sum_t |X_t B w_t - y_t|^2, by turns: heads, then the basis, which both lower the loss.

    It starts from the strongest left singular vectors of the tasks' own solutions, each times the square root of its
    number of rows. The loss has no other guarantee than that it falls.

    Args:
        rank: K, in [1, D].
        steps: of both, at most; it ends when the loss falls by less than `tolerance` of itself.
    """
    require_in(f"[1, {tasks.cross_TD.shape[1]}]", rank=rank)
    own_TD = torch.linalg.lstsq(tasks.gram_TDD, tasks.cross_TD[..., None], driver="gelsd").solution[..., 0]
    basis_DK = thin_svd((tasks.rows_T.sqrt()[:, None] * own_TD).T)[0][:, :rank]
    if basis_DK.shape[1] < rank:  # fewer tasks than dimensions
        basis_DK = torch.linalg.qr(torch.cat([basis_DK, torch.eye(len(basis_DK), dtype=torch.float64)], 1)).Q[:, :rank]
    heads_TK, loss = _heads(tasks, basis_DK)
    for _ in range(steps):
        basis_DK = torch.linalg.qr(_basis(tasks, heads_TK, basis_DK)).Q
        before = loss
        heads_TK, loss = _heads(tasks, basis_DK)
        if before - loss <= tolerance * before:
            break
    return SharedSubspace(basis_DK, heads_TK.T, max(loss, 0.0))


def _heads(tasks: TaskMoments, basis_DK: Tensor) -> tuple[Tensor, float]:
    """Those of least squares on a basis, [T K], and the loss that they leave."""
    inner_TKK = basis_DK.T @ tasks.gram_TDD @ basis_DK
    cross_TK = tasks.cross_TD @ basis_DK
    heads_TK = torch.linalg.lstsq(inner_TKK, cross_TK[..., None], driver="gelsd").solution[..., 0]
    return heads_TK, float(tasks.energy_T.sum() - (heads_TK * cross_TK).sum())


def _basis(tasks: TaskMoments, heads_TK: Tensor, start_DK: Tensor) -> Tensor:
    """The matrix of least squares for these heads. Its equations have (D K)^2 entries, which are solved at once while
    they are few, and else by some steps of conjugate gradients, which lower the loss too.
    """
    wanted_DK, rank = tasks.cross_TD.T @ heads_TK, heads_TK.shape[1]
    if start_DK.numel() <= SOLVED_AT_ONCE:
        products_TKK = heads_TK[:, :, None] * heads_TK[:, None]
        full_DEKK = (tasks.gram_TDD.flatten(1).T @ products_TKK.flatten(1)).view(*tasks.gram_TDD.shape[1:], *2 * [rank])
        full = full_DEKK.transpose(1, 2).reshape(wanted_DK.numel(), -1)
        return torch.linalg.lstsq(full, wanted_DK.reshape(-1, 1), driver="gelsy").solution.view_as(wanted_DK)

    def normal(basis_DK: Tensor) -> Tensor:
        seen_TD = (tasks.gram_TDD @ (heads_TK @ basis_DK.T)[..., None])[..., 0]
        return seen_TD.T @ heads_TK

    basis_DK = start_DK.clone()
    rest_DK = wanted_DK - normal(basis_DK)
    way_DK, size = rest_DK, float(rest_DK.square().sum())
    enough = 1e-20 * float(wanted_DK.square().sum())
    for _ in range(GRADIENTS):
        if size <= enough:
            break
        pushed_DK = normal(way_DK)
        length = size / float((way_DK * pushed_DK).sum())
        basis_DK = basis_DK + length * way_DK
        rest_DK = rest_DK - length * pushed_DK
        before, size = size, float(rest_DK.square().sum())
        way_DK = rest_DK + size / before * way_DK
    return basis_DK
