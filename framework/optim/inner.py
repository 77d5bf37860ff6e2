"""The rule that turns coordinates of a gradient into a direction: Adam, SGD with momentum, or orthogonalisation.

Shapes: B matrices, M rows (kept), R rank.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightspan.errors import UserError
from lightspan.optim.layout import Layout, State
from lightspan.optim.moments import MomentStorage
from lightspan.triton_kernels.low_rank_adam import low_rank_adam


@dataclass(frozen=True)
class AdamSettings:
    """What a step takes from its parameter group: Adam's betas and eps, and a seed (int64, 0-d) for roundings."""

    betas: tuple[float, float]
    eps: float
    seed: Tensor


@dataclass(frozen=True)
class InnerContext:
    """What an inner rule needs besides coordinates and its own state.

    Args:
        source_BR: where each column's state is, -1 for nowhere; None if every column is in its place.
    """

    layout: Layout
    moments: MomentStorage
    numbers: AdamSettings
    source_BR: Tensor | None = None


class Inner(ABC):
    """A rule in coordinates. Its state moves with the frame; see `lightspan.optim.carries`."""

    @abstractmethod
    def initial(self, layout: Layout, moments: MomentStorage) -> State:
        """State before the first step."""

    @abstractmethod
    def direction(self, coordinates_BMR: Tensor, state: State, setting: InnerContext) -> Tensor:
        """The direction [B M R], a new tensor; updates `state` in place."""


@dataclass(frozen=True)
class Adam(Inner):
    """Adam (Kingma & Ba 2015) with the group's betas and eps, and an age per column for its bias correction."""

    def initial(self, layout: Layout, moments: MomentStorage) -> State:
        first, second = (moments.initial(layout, name, layout.rank) for name in ("exp_avg", "exp_avg_sq"))
        return {**first, **second, "age": layout.zeros(layout.rank)}

    def direction(self, coordinates_BMR: Tensor, state: State, setting: InnerContext) -> Tensor:
        state["age"].add_(1)
        numbers, moments = setting.numbers, (state["exp_avg"], state["exp_avg_sq"], state["age"])
        scales = (state.get("exp_avg_scale"), state.get("exp_avg_sq_scale"))
        return low_rank_adam(
            coordinates_BMR, *moments, *numbers.betas, numbers.eps, *scales, setting.source_BR, numbers.seed
        )


def farthest(betas: tuple[float, float]) -> float:
    """The largest direction that Adam can give a coordinate, whatever its gradients: 7.3 at betas (0.9, 0.999), 2.2 at
    (0.908, 0.99); infinite for b1^2 >= b2.

    Both moments are sums over the same gradients, m of a_k g_k and v of b_k g_k^2, so m^2 <= v sum(a_k^2 / b_k) by
    Cauchy-Schwarz.
    """
    beta1, beta2 = betas
    return (1 - beta1) / ((1 - beta2) * (1 - beta1**2 / beta2)) ** 0.5 if beta1**2 < beta2 else math.inf


@dataclass(frozen=True)
class SGD(Inner):
    """Momentum: m <- momentum m + r, and m is the direction (torch.optim.SGD without dampening).

    Args:
        momentum: in [0, 1).
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise UserError(f"SGD momentum={self.momentum} must be in [0, 1)")

    def initial(self, layout: Layout, moments: MomentStorage) -> State:
        return moments.initial(layout, "exp_avg", layout.rank)

    def direction(self, coordinates_BMR: Tensor, state: State, setting: InnerContext) -> Tensor:
        first_BMR, source_BR = setting.moments.load(state, "exp_avg"), setting.source_BR
        if source_BR is not None:
            index_BMR = source_BR.clamp_min(0)[:, None].expand_as(first_BMR)
            first_BMR = first_BMR.gather(2, index_BMR) * (source_BR >= 0)[:, None]
        first_BMR = first_BMR * self.momentum + coordinates_BMR
        setting.moments.save(first_BMR, state, "exp_avg", setting.numbers.seed)
        return first_BMR


@dataclass(frozen=True)
class NewtonSchulz(Inner):
    """Orthogonalised coordinates, without state: momentum is outside, in an error feedback that forgets the captured
    part slowly (Trion and Dion; arXiv 2505.17967, section 4).

    Five steps of X <- a X + (b A + c A^2) X, A = X X^T, on the coordinates divided by their Frobenius norm.

    Args:
        steps: iterations, >= 1.
        scale: factor by the matrix' shape out x in: "kj" sqrt(max(1, out / in)), "kimi" 0.2 sqrt(max(out, in)),
            "dion" sqrt(out / in), "none" 1.
    """

    steps: int = 5
    scale: Literal["kj", "kimi", "dion", "none"] = "kj"

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"NewtonSchulz steps={self.steps} must be at least 1")

    def initial(self, layout: Layout, moments: MomentStorage) -> State:
        return {}

    def direction(self, coordinates_BMR: Tensor, state: State, setting: InnerContext) -> Tensor:
        rows, columns = setting.layout.shape
        factors = {
            "kj": max(1.0, rows / columns) ** 0.5,
            "kimi": 0.2 * max(rows, columns) ** 0.5,
            "dion": (rows / columns) ** 0.5,
            "none": 1.0,
        }
        whole_BMR = setting.layout.gathered(coordinates_BMR)
        orthogonal_BMR = newton_schulz(whole_BMR, self.steps, self.COEFFICIENTS).mul_(factors[self.scale])
        return setting.layout.own_rows(orthogonal_BMR)


def newton_schulz(x_BMR: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """Singular values pushed towards 1, singular vectors kept. The Gram matrix is formed on the shorter side."""
    a, b, c = coefficients
    x = x_BMR / (torch.linalg.matrix_norm(x_BMR, keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT.contiguous() if tall else x
