"""The rule that turns coordinates of a gradient into a direction: Adam, SGD with momentum, or orthogonalisation.

Shapes: B matrices, M rows (kept), R rank.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.optim.matrices.conventions import Convention, CoordinateConvention, coordinate_factor, shape_factor
from lightspan.optim.matrices.limits import require_valid
from lightspan.optim.matrices.moments import MomentStorage
from lightspan.optim.matrices.newton_schulz import JORDAN, STEPS, Precision, direction_of, operations_of
from lightspan.optim.matrices.stacks import Layout, State
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
    """A rule in coordinates. Its state moves with the frame; see `lightspan.optim.low_rank.carries`."""

    of_groups: ClassVar[tuple[str, ...]] = ()
    """Names of its settings that every parameter group has too, so that they can differ between groups, follow a
    schedule, and are saved and loaded. They change neither the names nor the shapes of the state. Rules
    with any are dataclasses."""

    @abstractmethod
    def initial(self, layout: Layout, moments: MomentStorage) -> State:
        """State before the first step."""

    @abstractmethod
    def direction(self, coordinates_BMR: Tensor, state: State, setting: InnerContext) -> Tensor:
        """The direction [B M R], a new tensor; updates `state` in place."""

    def factor(self, layout: Layout) -> float:
        """Of the whole update, with what the residual makes of a direction: multiplies the rate."""
        return 1.0

    def operations(self, layout: Layout) -> int:
        """About how many `direction` takes for one matrix: a few for each coordinate."""
        return 20 * layout.rows * layout.rank


@dataclass(frozen=True)
class Adam(Inner):
    """Adam (Kingma & Ba 2015) with the group's betas and eps, and an age per column for its bias correction.

    Args:
        convention: factor of the update by the shape of the matrix: "adamw", with which AdamW's rate and decay can be
            kept, or "none", as published; see `lightspan.optim.matrices.conventions.coordinate_factor`.
    """

    convention: CoordinateConvention = "none"

    of_groups: ClassVar[tuple[str, ...]] = ("convention",)

    def __post_init__(self) -> None:
        if self.convention not in get_args(CoordinateConvention):
            raise UserError(
                f"Adam convention={self.convention!r} must be one of {', '.join(get_args(CoordinateConvention))}"
            )

    def factor(self, layout: Layout) -> float:
        return 1.0 if self.convention == "none" else coordinate_factor(self.convention, layout)

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


def largest_direction(betas: tuple[float, float]) -> float:
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

    of_groups: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        require_valid(type(self).__name__, vars(self))

    def initial(self, layout: Layout, moments: MomentStorage) -> State:
        return moments.initial(layout, "exp_avg", layout.rank)

    def direction(self, coordinates_BMR: Tensor, state: State, setting: InnerContext) -> Tensor:
        first_BMR = _first_moment(state, setting) * self.momentum + coordinates_BMR
        setting.moments.save(first_BMR, state, "exp_avg", setting.numbers.seed)
        return first_BMR


@dataclass(frozen=True)
class NewtonSchulz(Inner):
    """Orthogonalised coordinates, without state: momentum is outside, in an error feedback that forgets the captured
    part slowly (Trion and Dion; arXiv 2505.17967, section 4).

    Five steps of X <- (a I + b A + c A^2) X, A = X X^T, on the coordinates divided by their Frobenius norm; see
    `lightspan.optim.matrices.newton_schulz`.

    Args:
        steps: iterations, >= 1.
        convention: factor by the shape of the matrix, see `lightspan.optim.matrices.conventions.shape_factor`.
        precision: of the products, see `lightspan.optim.matrices.newton_schulz.Precision`.
    """

    steps: int = STEPS
    convention: Convention = "kj"
    precision: Precision = "float32"

    of_groups: ClassVar[tuple[str, ...]] = ("convention", "precision")

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise UserError(f"NewtonSchulz steps={self.steps} must be at least 1, a whole number")
        require_valid(type(self).__name__, vars(self))

    def initial(self, layout: Layout, moments: MomentStorage) -> State:
        return {}

    def operations(self, layout: Layout) -> int:
        return operations_of(layout, layout.rank, self.steps)

    def direction(self, coordinates_BMR: Tensor, state: State, setting: InnerContext) -> Tensor:
        found_BMR = direction_of(coordinates_BMR, setting.layout, self.precision, (JORDAN,) * self.steps)
        return found_BMR.mul_(shape_factor(self.convention, setting.layout))


def _first_moment(state: State, setting: InnerContext) -> Tensor:
    """The moment in the coordinates' precision, columns where they belong; the stored tensor itself if that is so."""
    first_BMR, source_BR = setting.moments.load(state, "exp_avg").to(setting.layout.dtype), setting.source_BR
    if source_BR is None:
        return first_BMR
    index_BMR = source_BR.clamp_min(0)[:, None].expand_as(first_BMR)
    return first_BMR.gather(2, index_BMR) * (source_BR >= 0)[:, None]
