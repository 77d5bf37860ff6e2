"""The rule that turns coordinates of a gradient into a direction: Adam, SGD with momentum, or orthogonalisation.

Shapes: B matrices, M rows (kept), R rank.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightspan.errors import UserError
from lightspan.optim.layout import Layout, State
from lightspan.optim.moments import MomentStorage
from lightspan.optim.newton_schulz import orthogonalised, orthogonalised_parts
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

    by_heads = False
    """Whether layouts tell it which rows of a parameter belong to one attention head."""
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

    of_groups: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        _require_share(self, momentum=self.momentum)

    def initial(self, layout: Layout, moments: MomentStorage) -> State:
        return moments.initial(layout, "exp_avg", layout.rank)

    def direction(self, coordinates_BMR: Tensor, state: State, setting: InnerContext) -> Tensor:
        first_BMR = _first_moment(state, setting) * self.momentum + coordinates_BMR
        setting.moments.save(first_BMR, state, "exp_avg", setting.numbers.seed)
        return first_BMR


Convention = Literal["kj", "kimi", "dion", "none"]
"""Names of factors by the shape of the matrix; see `NewtonSchulz`."""
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class NewtonSchulz(Inner):
    """Orthogonalised coordinates, without state: momentum is outside, in an error feedback that forgets the captured
    part slowly (Trion and Dion; arXiv 2505.17967, section 4).

    Five steps of X <- (a I + b A + c A^2) X, A = X X^T, on the coordinates divided by their Frobenius norm; see
    `lightspan.optim.newton_schulz`.

    Args:
        steps: iterations, >= 1.
        convention: factor by the shape out x in of the matrix, or of its part with the most rows if heads are apart:
            "kj" sqrt(max(1, out / in)), "kimi" 0.2 sqrt(max(out, in)), "dion" sqrt(out / in), "none" 1.
        precision: of the products. "bfloat16", as in published code, is what tensor cores are made for, and halves what
            travels between ranks; it moves singular values by up to 0.4. "float32" is float64 for float64 weights.
    """

    steps: int = 5
    convention: Convention = "kj"
    precision: Precision = "float32"

    of_groups: ClassVar[tuple[str, ...]] = ("convention", "precision")
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise UserError(f"NewtonSchulz steps={self.steps} must be at least 1, a whole number")
        for name, names in (("convention", Convention), ("precision", Precision)):
            if (value := getattr(self, name)) not in get_args(names):
                raise UserError(f"{type(self).__name__} {name}={value!r} must be one of {', '.join(get_args(names))}")

    def initial(self, layout: Layout, moments: MomentStorage) -> State:
        return {}

    def direction(self, coordinates_BMR: Tensor, state: State, setting: InnerContext) -> Tensor:
        rows, columns = setting.layout.shape
        rows = max(setting.layout.heads, default=rows)
        factors = {
            "kj": max(1.0, rows / columns) ** 0.5,
            "kimi": 0.2 * max(rows, columns) ** 0.5,
            "dion": (rows / columns) ** 0.5,
            "none": 1.0,
        }
        return self.unscaled(coordinates_BMR, state, setting).mul_(factors[self.convention])

    def unscaled(self, coordinates_BMR: Tensor, state: State, setting: InnerContext) -> Tensor:
        """The direction before that factor; a new tensor."""
        dtype = torch.bfloat16 if self.precision == "bfloat16" else coordinates_BMR.dtype
        given_BMR, layout, method = coordinates_BMR.to(dtype), setting.layout, (self.steps, self.COEFFICIENTS)
        if layout.heads:
            axis = -1 if layout.wide else -2
            found_BMR = orthogonalised_parts(given_BMR, layout.heads, axis, layout.shards, *method)
        else:
            found_BMR = orthogonalised(given_BMR, layout.shards, *method)
        return found_BMR.to(coordinates_BMR.dtype)


@dataclass(frozen=True)
class MomentumNewtonSchulz(NewtonSchulz):
    """Muon's rule: m <- mu m + (1 - mu) r, and the orthogonalised nu m + (1 - nu) r is the direction.

    Args:
        momentum: mu in [0, 1).
        nu: in [0, 1], the share of m in what is orthogonalised, as in quasi-hyperbolic momentum (Ma & Yarats 2019,
            arXiv 1810.06801). None means mu, which is Nesterov's momentum; 1 is m itself.
        by_heads: whether each attention head's queries and keys are a matrix of their own, where the parameter group
            says which rows these are (`heads`, see `lightspan.optim.low_rank.LowRank`). GLM-5 calls it Muon
            Split (arXiv 2602.15763).
        steps, convention, precision: see `NewtonSchulz`.
    """

    momentum: float = 0.95
    nu: float | None = None
    by_heads: bool = False

    of_groups: ClassVar[tuple[str, ...]] = (*NewtonSchulz.of_groups, "momentum", "nu")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share(self, momentum=self.momentum)
        if self.nu is not None and not 0 <= self.nu <= 1:
            raise UserError(f"{type(self).__name__} nu={self.nu} must be in [0, 1], or None for the momentum")

    def initial(self, layout: Layout, moments: MomentStorage) -> State:
        return moments.initial(layout, "exp_avg", layout.rank)

    def unscaled(self, coordinates_BMR: Tensor, state: State, setting: InnerContext) -> Tensor:
        first_BMR = _first_moment(state, setting).lerp_(coordinates_BMR, 1 - self.momentum)
        setting.moments.save(first_BMR, state, "exp_avg", setting.numbers.seed)
        mixed_BMR = coordinates_BMR.lerp(first_BMR, self.momentum if self.nu is None else self.nu)
        return super().unscaled(mixed_BMR, state, setting)


@dataclass(frozen=True)
class _Evened(MomentumNewtonSchulz):
    """What rules share that divide Muon's direction by roots of running means of its squares."""

    beta2: float = 0.95

    of_groups: ClassVar[tuple[str, ...]] = (*MomentumNewtonSchulz.of_groups, "beta2")
    EPSILON = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share(self, beta2=self.beta2)

    def brought_to(self, norm_B: Tensor, direction_BMR: Tensor, layout: Layout) -> Tensor:
        """The directions at these Frobenius norms, in place."""
        reached_B = layout.total(direction_BMR.square().sum(dim=(1, 2))).sqrt()
        return direction_BMR.mul_((norm_B / (reached_B + self.EPSILON))[:, None, None])


@dataclass(frozen=True)
class NeuronNewtonSchulz(_Evened):
    """NorMuon's rule (arXiv 2510.05491, algorithm 1): Muon's direction O, each neuron's part of it divided by the root
    of a running mean of its squares, and all of it then brought back to the norm of O.

    A neuron is a row of the parameter [out in]; in coordinates of a smaller frame, a row or column that stands for it.

    Args:
        beta2: of the running mean, in [0, 1).
        momentum, nu, by_heads, steps, convention, precision: see `MomentumNewtonSchulz`.
    """

    def initial(self, layout: Layout, moments: MomentStorage) -> State:
        neurons = layout.zeros(layout.rank if layout.wide else layout.rows)
        return {**super().initial(layout, moments), "neuron_sq": neurons}

    def unscaled(self, coordinates_BMR: Tensor, state: State, setting: InnerContext) -> Tensor:
        direction_BMR, layout = super().unscaled(coordinates_BMR, state, setting), setting.layout
        square_BMR = direction_BMR.square()
        # The step sees wide parameters transposed: neurons are then its columns, with rows on every rank.
        if layout.wide:
            sum_BR = layout.total(square_BMR.sum(dim=1))
            second_B1R = state["neuron_sq"].lerp_(sum_BR / max(layout.shape), 1 - self.beta2)[:, None]
            direction_BMR.div_(second_B1R.sqrt() + self.EPSILON)
            norm_B = sum_BR.sum(dim=1).sqrt()
        else:
            second_BM1 = state["neuron_sq"].lerp_(square_BMR.mean(dim=2), 1 - self.beta2)[..., None]
            direction_BMR.div_(second_BM1.sqrt() + self.EPSILON)
            norm_B = layout.total(square_BMR.sum(dim=(1, 2))).sqrt()
        return self.brought_to(norm_B, direction_BMR, layout)


@dataclass(frozen=True)
class FactoredNewtonSchulz(_Evened):
    """Muon's direction O, each number divided by the root of what is usual in its row and in its column, and all of it
    then brought back to the norm of O: O_ij / sqrt(v_i w_j), with v and w running means of O^2 over a row and over a
    column. Up to a factor, which the norm takes away, v w^T is the factored second moment of Adafactor (Shazeer & Stern
    2018, arXiv 1804.04235, section 3). With v alone it is NorMuon's rule, see `NeuronNewtonSchulz`.

    Before the norm is brought back, each number is clamped to 1 / mean(w), which is 1, the largest number of an
    orthogonal matrix, at the scale that these divisions leave. A number that is alone in its row and its column is
    divided by its own size twice, so that without this bound one with a small gradient would take the whole step.

    Args:
        beta2: of the running means, in [0, 1).
        momentum, nu, by_heads, steps, convention, precision: see `MomentumNewtonSchulz`.
    """

    def initial(self, layout: Layout, moments: MomentStorage) -> State:
        rows, columns = layout.zeros(layout.rows), layout.zeros(layout.rank)
        return {**super().initial(layout, moments), "row_sq": rows, "column_sq": columns}

    def unscaled(self, coordinates_BMR: Tensor, state: State, setting: InnerContext) -> Tensor:
        direction_BMR, layout = super().unscaled(coordinates_BMR, state, setting), setting.layout
        square_BMR = direction_BMR.square()
        sum_BR = layout.total(square_BMR.sum(dim=1))
        row_BM1 = state["row_sq"].lerp_(square_BMR.mean(dim=2), 1 - self.beta2)[..., None]
        column_B1R = state["column_sq"].lerp_(sum_BR / max(layout.shape), 1 - self.beta2)[:, None]
        direction_BMR.div_(row_BM1.sqrt() + self.EPSILON).div_(column_B1R.sqrt() + self.EPSILON)
        limit_B11 = column_B1R.mean(dim=2, keepdim=True).reciprocal()
        direction_BMR.clamp_(-limit_B11, limit_B11)
        return self.brought_to(sum_BR.sum(dim=1).sqrt(), direction_BMR, layout)


@dataclass(frozen=True)
class SelectiveNewtonSchulz(NewtonSchulz):
    """Dion2's rule (arXiv 2512.16928): m <- m + r, of which only the columns with the largest sums of absolute values
    are orthogonalised and stepped; only these forget, m <- mu m.

    Columns are those of the step, the shorter side of the parameter.

    Args:
        fraction: of the columns, in (0, 1]; rounded up.
        momentum: mu in [0, 1).
        steps, convention, precision: see `NewtonSchulz`.
    """

    fraction: float = 0.25
    momentum: float = 0.95

    of_groups: ClassVar[tuple[str, ...]] = (*NewtonSchulz.of_groups, "fraction", "momentum")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share(self, momentum=self.momentum)
        if not 0 < self.fraction <= 1:
            raise UserError(f"{type(self).__name__} fraction={self.fraction} must be in (0, 1]")

    def initial(self, layout: Layout, moments: MomentStorage) -> State:
        return moments.initial(layout, "exp_avg", layout.rank)

    def unscaled(self, coordinates_BMR: Tensor, state: State, setting: InnerContext) -> Tensor:
        layout, count = setting.layout, math.ceil(self.fraction * setting.layout.rank)
        sum_BMR = _first_moment(state, setting).add_(coordinates_BMR)
        chosen_BK = layout.total(sum_BMR.abs().sum(dim=1)).topk(count, dim=1).indices
        index_BMK = chosen_BK[:, None].expand(-1, layout.rows, -1)
        chosen_BMK = sum_BMR.gather(2, index_BMK)
        sum_BMR.scatter_(2, index_BMK, chosen_BMK * self.momentum)
        setting.moments.save(sum_BMR, state, "exp_avg", setting.numbers.seed)
        chosen_BMK = super().unscaled(chosen_BMK, state, setting)
        return torch.zeros_like(coordinates_BMR).scatter_(2, index_BMK, chosen_BMK)


def _require_share(rule: Inner, **shares: float) -> None:
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise UserError(f"{type(rule).__name__} {name}={value} must be in [0, 1)")


def _first_moment(state: State, setting: InnerContext) -> Tensor:
    """The moment in the coordinates' precision, columns where they belong; the stored tensor itself if that is so."""
    first_BMR, source_BR = setting.moments.load(state, "exp_avg").to(setting.layout.dtype), setting.source_BR
    if source_BR is None:
        return first_BMR
    index_BMR = source_BR.clamp_min(0)[:, None].expand_as(first_BMR)
    return first_BMR.gather(2, index_BMR) * (source_BR >= 0)[:, None]
