"""Optimisers of whole matrices: each steps along its orthogonalised momentum, and what is no matrix gets AdamW.

| class          | momentum m                        | orthogonalised    | then divided by roots of running means of  |
|----------------|-----------------------------------|-------------------|--------------------------------------------|
| `Muon`         | moving average                    | nu m + (1 - nu) g | -                                          |
| `NorMuon`      | moving average                    | nu m + (1 - nu) g | squares in rows                            |
| `FactoredMuon` | moving average, in 8 bits         | nu m + (1 - nu) g | squares in rows and in columns             |
| `Dion2`        | sum that forgets what was stepped | columns of m      | -                                          |

`FactoredMuon` is this project's own, and the one to try first: it had the lowest loss of those compared in
docs/benchmarks.md (150 to 500 steps), at a byte of state for each weight. The others say when to use them instead. Each
equals the equations of its namesake in `lightspan.optim.reference`, which should be read first.

A class' `direction` is its rule. What is the same for all is in `_Step.apply`:

    W <- (1 - lr wd) W - lr scale f direction(G)

with f the factor by shape of the group's `convention`. Wide matrices are transposed, so that Gram matrices are those of
the shorter side, and matrices of one shape are stepped at once. Decay is decoupled, as in AdamW. Groups can have their
own momentum, convention and all else that is no part of the state's format.

Shapes: B matrices, M rows (the longer side; those of this rank), N columns, K columns that are chosen.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightspan.optim.matrices.conventions import Convention, shape_factor
from lightspan.optim.matrices.limits import require_valid
from lightspan.optim.matrices.loading import described
from lightspan.optim.matrices.moments import Int8Moments, MomentStorage
from lightspan.optim.matrices.newton_schulz import (
    COEFFICIENTS,
    Coefficients,
    Precision,
    direction_of,
    operations_of,
)
from lightspan.optim.matrices.stacks import WEIGHT_STREAM, Bucket, Layout, StackStep, State, existing, stacked
from lightspan.optim.two_rates import TwoRates
from lightspan.triton_kernels.backproject_update import update

EPSILON = 1e-10


class _Step(StackStep):
    """One step of a bucket's matrices along the directions of a rule."""

    def __init__(self, bucket: Bucket, rule: "_WholeMatrices") -> None:
        super().__init__(bucket)
        self.rule = rule

    def apply(self, weights: list[Tensor], clip: Tensor | None) -> None:
        gradient_BMN = stacked(existing(self.gradients), self.layout.dtype)
        if clip is not None:
            gradient_BMN.mul_(clip.to(gradient_BMN.dtype))
        direction_BMN = self.rule.direction(gradient_BMN, self)
        factor = shape_factor(self.bucket.group["convention"], self.layout)
        seed = self.bucket.noise + WEIGHT_STREAM if weights[0].dtype == torch.bfloat16 else None
        if self.layout.rows:  # a rank may have no rows of a small matrix
            update(weights, list(direction_BMN), *self.rates(), seed, factor)


class _WholeMatrices(TwoRates):
    """What the optimisers here share."""

    KEPT_IN_COPIES = ("by_heads",)
    projects_late = True
    _valid: Sequence[dict[str, Any]] = ()
    """The groups' settings of the rule as of the last step that checked them."""

    def initial(self, layout: Layout) -> State:
        return self.moments.initial(layout, "exp_avg", layout.size)

    def step_of(self, bucket: Bucket) -> StackStep:
        return _Step(bucket, self)

    def operations(self, layout: Layout) -> int:
        return operations_of(layout, layout.size)

    def fixed(self) -> dict[str, str]:
        return {"update": type(self).__name__, "by_heads": str(self.by_heads), "moments": described(self.moments)}

    def _require_supported(self) -> None:
        super()._require_supported()
        now = [{name: group[name] for name in self.settings} for group in self.param_groups]
        if now != self._valid:  # changed by a schedule, or by hand
            for number, (group, own) in enumerate(zip(self.param_groups, now, strict=True)):
                require_valid(f"{type(self).__name__} group {group.get('name', number)!r}:", own)
            self._valid = now

    @abstractmethod
    def direction(self, gradient_BMN: Tensor, step: StackStep) -> Tensor:
        """The directions [B M N] before factors, a new tensor, from clipped gradients; updates the step's state."""

    def orthogonalised_momentum(self, gradient_BMN: Tensor, step: StackStep) -> Tensor:
        """m <- mu m + (1 - mu) g, and the orthogonalised nu m + (1 - nu) g, where nu is mu unless it is set."""
        group = step.bucket.group
        momentum_BMN = self.moments.load(step.state, "exp_avg").to(gradient_BMN.dtype)
        momentum_BMN.lerp_(gradient_BMN, 1 - group["momentum"])
        self.moments.save(momentum_BMN, step.state, "exp_avg", step.bucket.noise)
        nu = group["momentum"] if group["nu"] is None else group["nu"]
        polynomials = COEFFICIENTS[group["coefficients"]]
        return direction_of(gradient_BMN.lerp(momentum_BMN, nu), step.layout, group["precision"], polynomials)


class Muon(_WholeMatrices):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): whole matrices step along their
    orthogonalised momentum. Equations: `lightspan.optim.reference.Muon`.

    For recipes and comparisons with the published one: `FactoredMuon` reaches a lower loss, and keeps a quarter of
    its state as long as the momentum of this one is in float32.

    For hidden matrices and convolutions; leave embeddings and heads to AdamW with project=False, as
    `lightspan.optim.groups` does for embeddings. With `convention="adamw"` AdamW's rate and decay can be kept. With
    "kimi" it is that of Moonlight (arXiv 2502.16982), whose steps are as long as AdamW's at the same rate; 8 times
    AdamW's rate was best where it was searched. A step decays by `lr` times `weight_decay`, so divide a decay tuned for
    AdamW by that factor. With `moments=Int8Moments()` the momentum takes a byte a weight.

    Args:
        lr: of the matrices.
        momentum: mu in [0, 1).
        nesterov: whether the gradient is added once more to the momentum that is orthogonalised, so that the share of
            the momentum is nu = mu instead of 1. Groups have `nu`.
        by_heads: whether the queries and the keys of each attention head are orthogonalised by themselves, where the
            groups say which rows these are, as those of `lightspan.optim.groups.ParameterGroups` do. GLM-5 calls it
            Muon Split (arXiv 2602.15763).
        convention: factor by shape, see `lightspan.optim.matrices.conventions.shape_factor`.
        precision: of products, see `lightspan.optim.matrices.newton_schulz.Precision`; published code has "bfloat16",
            which is for large models on GPUs, and for processors that have instructions for it.
        coefficients: of the polynomials, see `lightspan.optim.matrices.newton_schulz.Coefficients`; those of
            "polar_express" take four steps instead of five.
        other_lr, betas, eps: of the AdamW for everything else.
        options: of `lightspan.optim.matrices.matrix_optimizer.MatrixOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        by_heads: bool = False,
        convention: Convention = "kj",
        precision: Precision = "float32",
        coefficients: Coefficients = "jordan",
        other_lr: float | Tensor = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        **options: Any,
    ) -> None:
        self.settings = _settings(momentum, None if nesterov else 1.0, convention, precision, coefficients)
        self.by_heads = by_heads
        super().__init__(params, lr, other_lr=other_lr, betas=betas, eps=eps, **options)

    def direction(self, gradient_BMN: Tensor, step: StackStep) -> Tensor:
        return self.orthogonalised_momentum(gradient_BMN, step)


class NorMuon(_WholeMatrices):
    """NorMuon (arXiv 2510.05491, algorithm 1): Muon's direction O, each neuron's part of it divided by the root of a
    running mean of its squares, and all of it then brought back to the norm of O. A neuron is a row of the parameter.
    Equations: `lightspan.optim.reference.NorMuon`. For comparisons with its paper; `FactoredMuon` does the same for
    columns too.

    It costs a number a neuron more than Muon. As in the published code there is Nesterov momentum, which the paper has
    not, and the norm is that of Muon's direction; the paper's, 0.2 sqrt(out in), is what `convention="kimi"` gives an
    orthogonal matrix. The code takes each row of a convolution's kernels for a neuron, here that is a whole filter.

    Args:
        beta2: of the running mean of a neuron's squares, in [0, 1).
        lr, momentum, nesterov, by_heads, convention, precision, coefficients, other_lr, betas, eps, options: as in
            `Muon`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-2,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = True,
        by_heads: bool = False,
        convention: Convention = "kj",
        precision: Precision = "float32",
        coefficients: Coefficients = "jordan",
        other_lr: float | Tensor = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        **options: Any,
    ) -> None:
        self.settings = {
            **_settings(momentum, None if nesterov else 1.0, convention, precision, coefficients),
            "beta2": beta2,
        }
        self.by_heads = by_heads
        super().__init__(params, lr, other_lr=other_lr, betas=betas, eps=eps, **options)

    def initial(self, layout: Layout) -> State:
        return {**super().initial(layout), "neuron_sq": layout.zeros(layout.size if layout.wide else layout.rows)}

    def direction(self, gradient_BMN: Tensor, step: StackStep) -> Tensor:
        layout, share = step.layout, 1 - step.bucket.group["beta2"]
        direction_BMN = self.orthogonalised_momentum(gradient_BMN, step)
        square_BMN = direction_BMN.square()
        # Neurons of wide parameters are columns here, with rows on every rank.
        if layout.wide:
            sum_BN = layout.total(square_BMN.sum(dim=1))
            second_B1N = step.state["neuron_sq"].lerp_(sum_BN / max(layout.shape), share)[:, None]
            direction_BMN.div_(second_B1N.sqrt() + EPSILON)
            norm_B = sum_BN.sum(dim=1).sqrt()
        else:
            second_BM1 = step.state["neuron_sq"].lerp_(square_BMN.mean(dim=2), share)[..., None]
            direction_BMN.div_(second_BM1.sqrt() + EPSILON)
            norm_B = layout.total(square_BMN.sum(dim=(1, 2))).sqrt()
        return _brought_to(norm_B, direction_BMN, layout)


class FactoredMuon(_WholeMatrices):
    """Muon with the factored second moment of Adafactor on its orthogonalised momentum, in 8 bits: about a seventh of
    AdamW's state, as `Muon` and `NorMuon` have in 8 bits too. Not published under this name; NorMuon (arXiv 2510.05491)
    is what it becomes with means over rows alone. Equations: `lightspan.optim.reference.FactoredMuon`.

    Each number of Muon's direction O is divided by the root of what is usual in its row and in its column, and all of
    it is then brought back to the norm of O: O_ij / sqrt(v_i w_j), with v and w running means of O^2 over a row and
    over a column. Up to a factor, which the norm takes away, v w^T is the factored second moment of Adafactor (Shazeer
    & Stern 2018, arXiv 1804.04235, section 3). Before the norm is brought back, each number is clamped to 1 / mean(w),
    which is 1, the largest number of an orthogonal matrix, at the scale that these divisions leave. A number that is
    alone in its row and its column is divided by its own size twice, so that without this bound one with a small
    gradient would take the whole step.

    Steps are of such a length that AdamW's rate and decay can be kept (`convention="adamw"`, see
    `lightspan.optim.matrices.conventions`). With Moonlight's convention, "kimi", whose steps are as long as AdamW's, 8
    to 16 times its rate was best, at which a decay is as many times stronger. Momentum is quasi-hyperbolic (Ma & Yarats
    2019, arXiv 1810.06801): a longer memory with a larger share of the newest gradient than Nesterov's.

    Only the orthogonalisation knows heads: rows, columns and the norm are those of the whole parameter, so a fused
    weight of queries, keys and values takes other steps than the three apart.

    Args:
        beta2: of the running means of squares over rows and over columns, in [0, 1).
        moments: storage of the momentum, and of AdamW's moments in what is not taken.
        nu: in [0, 1], the share of the momentum in what is orthogonalised, the rest being the gradient: less than in
            Nesterov's momentum, whose share is `momentum`.
        other_lr: of the AdamW for everything else; None for `lr`.
        lr, momentum, by_heads, convention, precision, coefficients, betas, eps, options: as in `Muon`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        beta2: float = 0.95,
        nu: float = 0.6,
        by_heads: bool = True,
        convention: Convention = "adamw",
        precision: Precision = "float32",
        coefficients: Coefficients = "jordan",
        moments: MomentStorage = Int8Moments(),  # noqa: B008 - frozen
        other_lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        **options: Any,
    ) -> None:
        self.settings = {**_settings(momentum, nu, convention, precision, coefficients), "beta2": beta2}
        self.by_heads = by_heads
        rest = lr if other_lr is None else other_lr
        super().__init__(params, lr, moments=moments, other_lr=rest, betas=betas, eps=eps, **options)

    def initial(self, layout: Layout) -> State:
        rows, columns = layout.zeros(layout.rows), layout.zeros(layout.size)
        return {**super().initial(layout), "row_sq": rows, "column_sq": columns}

    def direction(self, gradient_BMN: Tensor, step: StackStep) -> Tensor:
        layout, share = step.layout, 1 - step.bucket.group["beta2"]
        direction_BMN = self.orthogonalised_momentum(gradient_BMN, step)
        square_BMN = direction_BMN.square()
        sum_BN = layout.total(square_BMN.sum(dim=1))
        row_BM1 = step.state["row_sq"].lerp_(square_BMN.mean(dim=2), share)[..., None]
        column_B1N = step.state["column_sq"].lerp_(sum_BN / max(layout.shape), share)[:, None]
        direction_BMN.div_(row_BM1.sqrt() + EPSILON).div_(column_B1N.sqrt() + EPSILON)
        limit_B11 = column_B1N.mean(dim=2, keepdim=True).reciprocal()
        # `clamp_` with tensors that have to be expanded takes five times as long on a processor.
        torch.minimum(direction_BMN, limit_B11, out=direction_BMN)
        torch.maximum(direction_BMN, -limit_B11, out=direction_BMN)
        return _brought_to(sum_BN.sum(dim=1).sqrt(), direction_BMN, layout)


class Dion2(_WholeMatrices):
    """Dion2 (arXiv 2512.16928): Muon on the quarter of the columns, or rows, with the largest momentum, which alone
    decays. Equations: `lightspan.optim.reference.Dion2`.

    The momentum is a sum, m <- m + g. Only the columns with the largest sums of absolute values are orthogonalised and
    stepped, and only these forget, m <- mu m. Columns are those of the step, the shorter side of the parameter.

    It orthogonalises M x N / 4 numbers where Muon orthogonalises M x N: for large models, where that takes long. Its
    loss has not been measured here. A choice of the shorter side is made over all rows, on however many ranks they are;
    published code by default chooses along the side that is sharded, on each rank by itself. Of square matrices,
    columns are chosen here and rows there.

    Args:
        fraction: alpha, of the shorter side, in (0, 1]; rounded up.
        momentum: mu in [0, 1), what is left of a chosen column's momentum.
        convention: as in `Muon`; the default is that of the published code.
        lr, precision, coefficients, other_lr, betas, eps, options: as in `Muon`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        fraction: float = 0.25,
        momentum: float = 0.95,
        convention: Convention = "dion",
        precision: Precision = "float32",
        coefficients: Coefficients = "jordan",
        other_lr: float | Tensor = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        **options: Any,
    ) -> None:
        self.settings = {
            "fraction": fraction, "momentum": momentum, "convention": convention, "precision": precision,
            "coefficients": coefficients,
        }  # fmt: skip
        super().__init__(params, lr, other_lr=other_lr, betas=betas, eps=eps, **options)

    def operations(self, layout: Layout) -> int:
        return operations_of(layout, math.ceil(self.settings["fraction"] * layout.size))

    def direction(self, gradient_BMN: Tensor, step: StackStep) -> Tensor:
        layout, group, state = step.layout, step.bucket.group, step.state
        count = math.ceil(group["fraction"] * layout.size)
        sum_BMN = self.moments.load(state, "exp_avg").to(gradient_BMN.dtype).add_(gradient_BMN)
        chosen_BK = layout.total(sum_BMN.abs().sum(dim=1)).topk(count, dim=1).indices
        index_BMK = chosen_BK[:, None].expand(-1, layout.rows, -1)
        chosen_BMK = sum_BMN.gather(2, index_BMK)
        sum_BMN.scatter_(2, index_BMK, chosen_BMK * group["momentum"])
        self.moments.save(sum_BMN, state, "exp_avg", step.bucket.noise)
        found_BMK = direction_of(chosen_BMK, layout, group["precision"], COEFFICIENTS[group["coefficients"]])
        return torch.zeros_like(gradient_BMN).scatter_(2, index_BMK, found_BMK)


def _settings(
    momentum: float, nu: float | None, convention: Convention, precision: Precision, coefficients: Coefficients
) -> dict[str, Any]:
    """The settings of a group that steps along `orthogonalised_momentum`."""
    products = {"precision": precision, "coefficients": coefficients}
    return {"momentum": momentum, "nu": nu, "convention": convention, **products}


def _brought_to(norm_B: Tensor, direction_BMN: Tensor, layout: Layout) -> Tensor:
    """The directions at these Frobenius norms, in place."""
    reached_B = layout.total(direction_BMN.square().sum(dim=(1, 2))).sqrt()
    return direction_BMN.mul_((norm_B / (reached_B + EPSILON))[:, None, None])
