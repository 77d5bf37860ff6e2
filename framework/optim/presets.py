"""Published low-rank optimisers as choices of `LowRank`'s switches, with the papers' defaults.

| preset       | frame                     | moments at a change | residual                    | rule                |
|--------------|---------------------------|---------------------|-----------------------------|---------------------|
| `GaLore`     | SVD, every 200 steps      | stay                | dropped                     | Adam                |
| `FiraAdam`   | SVD, every 200 steps      | stay                | scaled per row, limited     | Adam                |
| `APOLLO`     | Gaussian, every 200 steps | stay                | scales the whole gradient   | Adam                |
| `APOLLOMini` | Gaussian, rank 1          | stay                | one scale for the matrix    | Adam                |
| `LDAdam`     | power step, every step    | rotate              | generalised error feedback  | Adam                |
| `DCTAdamW`   | DCT columns, every step   | gather              | error feedback              | Adam                |
| `Trion`      | DCT columns, every step   | -                   | momentum as error feedback  | Newton-Schulz       |
| `Muon`       | whole matrices            | -                   | none is left                | orthogonal momentum |
| `NorMuon`    | whole matrices            | -                   | none is left                | the same, by neuron |
| `Dion2`      | whole matrices            | -                   | none is left                | of some columns     |

`FactoredMuon` is this project's own, and the one to try first: it had the lowest loss of those compared in
docs/benchmarks.md (150 to 500 steps), at a byte of state for each weight. The others say when to use them instead.
Those inside a subspace keep less only with `moments=Int8Moments()` and a rank below a sixth of the shorter side (of
square matrices; a third where one side is four times the other); there, `LowRank` without a preset is what this project
recommends. Each preset equals the equations of its namesake in `lightspan.optim.reference`, which
should be read first, except for what is said here and in the classes. In the literature a frame's transpose is called
projector, and `refresh` update_proj_gap.

Where settings of published code do not carry over unchanged:

- Refreshes take turns: the k-th of n matrices changes its frame first after k / n of `refresh`. Published code changes
  all frames in one step; `refresh=Every(200, staggered=False)` of `lightspan.optim.bases` does so too.
- Weight decay comes before the step and is decoupled, as in AdamW; the GaLore and APOLLO packages decay after it.
- Fira's and APOLLO's limiter works on bias-corrected norms, their code's on uncorrected ones; None turns it off.
  `bound` is ours: no row moves farther than a stated multiple of AdamW's reach; `bound=None` is the paper's rule.
- What is not projected, vectors and matrices whose shorter side is not above `rank`, gets AdamW at the group's rate.
  The 1e-2 of GaLore, Fira and APOLLO is high for it, and their code does the same: set `other_lr` of
  `lightspan.optim.groups`, or give such parameters their own group. `Trion` and those without a frame have their own
  `other_lr`.
- Wide matrices are compressed on their rows and square ones on their columns, in all presets.

All accept the arguments of `LowRank`, except for the parts that define them. In a recipe a preset is a class path like
any other.
"""

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from lightspan.errors import UserError
from lightspan.optim.bases import DCTBasis, GaussianBasis, Never, PowerBasis, SVDBasis, Trigger, WholeBasis
from lightspan.optim.carries import Gather, Keep, Rotate
from lightspan.optim.inner import (
    Convention,
    FactoredNewtonSchulz,
    MomentumNewtonSchulz,
    NeuronNewtonSchulz,
    NewtonSchulz,
    Precision,
    SelectiveNewtonSchulz,
)
from lightspan.optim.low_rank import LowRank
from lightspan.optim.moments import Int8Moments, MomentStorage
from lightspan.optim.residuals import Apollo, ErrorFeedback, Fira
from lightspan.optim.settings import require_sound
from lightspan.optim.two_rates import TwoRates


class GaLore(LowRank):
    """GaLore (Zhao et al. 2024, arXiv 2403.03507, algorithm 2), with decoupled weight decay. `scale` is alpha.
    Equations: `lightspan.optim.reference.GaLore`.

    For comparisons with its paper, and for its recipes: `LowRank` reaches a lower loss at the same state, without SVDs.

    Published code projects a wide matrix by the SVD of G, not of G^T: signs of singular vectors are arbitrary, but
    moments are kept, so that runs agree only up to those signs.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        rank: int = 128,
        refresh: int | Trigger = 200,
        scale: float = 0.25,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, rank, SVDBasis(), None, refresh=refresh, scale=scale, **options)


class FiraAdam(LowRank):
    """Fira with Adam (Chen et al. 2024, arXiv 2410.01623, algorithm 1). Equations:
    `lightspan.optim.reference.FiraAdam`.

    For comparisons with its paper, and for its recipes: `LowRank` is Fira on a frame that costs no SVD.

    Args:
        scale: alpha, of the whole update, as in the paper.
        scale_residual: False is as in the published code: alpha scales U Q^T and R Q^T alone, so that the rescaled part
            is 1 / alpha times as long, and contains (1 - alpha) R Q^T. Its recipes need this: at the default their
            rates move weights only a quarter as far.
        limit, bound: of the norm-growth limiter and of a row, see `lightspan.optim.residuals.Fira`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        rank: int = 128,
        refresh: int | Trigger = 200,
        scale: float = 0.25,
        limit: float | None = 1.01,
        bound: float | None = 4.0,
        scale_residual: bool = True,
        **options: Any,
    ) -> None:
        require_sound("FiraAdam", {"scale": scale})
        if scale > 1 and not scale_residual:
            raise UserError(
                f"FiraAdam scale={scale} must be in (0, 1] with scale_residual=False, where the rescaled part takes "
                "over what it leaves of the gradient in the frame; raise lr instead"
            )
        residual = Fira(limit, bound) if scale_residual else Fira(limit, bound, inside=scale)
        scale = scale if scale_residual else 1.0
        super().__init__(params, lr, rank, SVDBasis(), residual, refresh=refresh, scale=scale, **options)


class APOLLO(LowRank):
    """APOLLO (Zhu et al. 2024, arXiv 2412.05270, algorithm 1), scales per channel of the longer side.
    Equations: `lightspan.optim.reference.APOLLO`.

    For comparisons with its paper, and where choosing a frame must cost nothing: its frames are random. `LowRank`
    reaches a lower loss at the same state.

    Args:
        scale: of the update. Published code takes the square root of what it calls scale: its 128 is 128**0.5 here.
        limit, bound: of the norm-growth limiter and of a row, see `lightspan.optim.residuals.Apollo`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        rank: int = 256,
        refresh: int | Trigger = 200,
        scale: float = 1.0,
        limit: float | None = 1.01,
        bound: float | None = 4.0,
        **options: Any,
    ) -> None:
        residual = Apollo("channel", limit, bound)
        super().__init__(params, lr, rank, GaussianBasis(), residual, refresh=refresh, scale=scale, **options)


class APOLLOMini(LowRank):
    """APOLLO-Mini (arXiv 2412.05270, section 4): rank 1, one scale per matrix, alpha = sqrt(128), which published code
    calls a scale of 128. `limit` and `bound` as in `APOLLO`; the bound is that of the whole matrix. Equations:
    `lightspan.optim.reference.APOLLOMini`. For models beside which no other state fits: it keeps the least of all, at
    the highest loss.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        rank: int = 1,
        refresh: int | Trigger = 200,
        scale: float = 128.0**0.5,
        limit: float | None = 1.01,
        bound: float | None = 4.0,
        **options: Any,
    ) -> None:
        residual = Apollo("tensor", limit, bound)
        super().__init__(params, lr, rank, GaussianBasis(), residual, refresh=refresh, scale=scale, **options)


class LDAdam(LowRank):
    """LDAdam (Robert et al. 2024, arXiv 2410.16103, algorithm 1): a new frame and rotated moments in every step. Its
    first frames come from power steps instead of an SVD, and a rotation leaves no second moment so small that Adam
    could not have reached its first with it; see `lightspan.optim.carries.Rotate`. Equations:
    `lightspan.optim.reference.LDAdam`.

    For comparisons with its paper, whose convergence is proved: of the presets inside a subspace it reaches the lowest
    loss, but its error takes four bytes a weight, so whole matrices in 8 bits cost less.

    In square matrices, such as those of queries, keys, values and outputs often are, published code compresses the rows
    and this class the columns.

    Args:
        rho: share of the momentum that frames follow, in [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int = 128,
        betas: tuple[float, float] = (0.908, 0.99),
        rho: float = 0.908,
        **options: Any,
    ) -> None:
        basis, residual = PowerBasis(momentum=rho, carry=Rotate(floor=False)), ErrorFeedback(of_moments=True)
        super().__init__(params, lr, rank, basis, residual, refresh=1, betas=betas, **options)


class DCTAdamW(LowRank):
    """DCT-AdamW (Modoranu et al. 2025, arXiv 2505.17967, algorithm 2). Equations:
    `lightspan.optim.reference.DCTAdamW`.

    For comparisons with its paper, and where frames are to cost nothing: they are columns of one fixed matrix, so none
    is stored, orthogonalised or sent between ranks. Others reach a lower loss with less state.

    Args:
        error_feedback: storage format of the error, None for none.
        rotate: whether moments follow their columns; otherwise they stay in their slots, as by the published code's
            default.
        norm: by which columns are compared; 2 loses least energy, the published code's default is 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int = 128,
        refresh: int | Trigger = 1,
        error_feedback: Literal["float32", "bfloat16", "int8", "int4"] | None = "int8",
        rotate: bool = True,
        norm: Literal[1, 2] = 2,
        **options: Any,
    ) -> None:
        basis = DCTBasis(norm=norm, carry=Gather(own_age=False) if rotate else Keep())
        residual = None if error_feedback is None else ErrorFeedback(error_feedback)
        super().__init__(params, lr, rank, basis, residual, refresh=refresh, **options)


class Trion(TwoRates):
    """Trion (arXiv 2505.17967, algorithm 1): Dion with DCT columns and Newton-Schulz on the coordinates. Equations:
    `lightspan.optim.reference.Trion`.

    For matrices so large that orthogonalising whole ones, as `Muon` does at the same state to a lower loss, takes too
    long.

    What is not projected gets AdamW at `other_lr`, see `lightspan.optim.two_rates.TwoRates`, with the published code's
    betas and eps. As published, there is no Nesterov momentum.

    Args:
        lr: of the projected matrices.
        other_lr: of everything else.
        momentum: mu in [0, 1), the share of the captured part that stays.
        norm: by which columns are compared; 2 loses least energy, the published code's default is 1.
        convention: factor by shape, see `NewtonSchulz`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-2,
        rank: int = 128,
        momentum: float = 0.95,
        norm: Literal[1, 2] = 2,
        convention: Convention = "kj",
        other_lr: float | Tensor = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        **options: Any,
    ) -> None:
        basis, residual = DCTBasis(norm=norm, carry=Keep()), ErrorFeedback(kept=momentum)
        inner = NewtonSchulz(convention=convention)
        super().__init__(
            params, lr, other_lr=other_lr, rank=rank, basis=basis, residual=residual, inner=inner, refresh=1,
            betas=betas, eps=eps, **options,
        )  # fmt: skip


class Muon(TwoRates):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): whole matrices step along their
    orthogonalised momentum. Equations: `lightspan.optim.reference.Muon`.

    For recipes and comparisons with the published one: `FactoredMuon` reaches a lower loss, and keeps a quarter of
    its state as long as the momentum of this one is in float32.

    For hidden matrices and convolutions; leave embeddings and heads to AdamW with project=False, as
    `lightspan.optim.groups` does for embeddings. With `convention="kimi"` it is that of Moonlight (arXiv 2502.16982),
    whose steps are as long as AdamW's at the same rate; 8 times AdamW's rate was best where it was searched. A step
    decays by `lr` times `weight_decay`, so divide a decay tuned for AdamW by that factor. With `moments=Int8Moments()`
    the momentum takes a byte a weight.

    Everything not taken gets AdamW at `other_lr`, see `lightspan.optim.two_rates.TwoRates`.

    Args:
        momentum: mu in [0, 1).
        nesterov: whether the gradient is added once more to the momentum that is orthogonalised.
        by_heads: whether the queries and the keys of each attention head are orthogonalised by themselves, where the
            groups say which rows these are, as those of `lightspan.optim.groups.ParameterGroups` do.
        convention: factor by shape, see `lightspan.optim.inner.NewtonSchulz`: "kj" is that of Jordan's code and the
            "original" of torch's Muon, "kimi" that of Moonlight and torch's "match_rms_adamw".
        precision: of products, see `NewtonSchulz`; published code has "bfloat16", which is for large models on GPUs.
        options: of `LowRank`. `rank` has no effect.
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
        other_lr: float | Tensor = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        **options: Any,
    ) -> None:
        nu = None if nesterov else 1.0
        inner = MomentumNewtonSchulz(
            momentum=momentum, nu=nu, by_heads=by_heads, convention=convention, precision=precision
        )
        super().__init__(
            params, lr, other_lr=other_lr, basis=WholeBasis(), residual=None, inner=inner, refresh=Never(), betas=betas,
            eps=eps, **options,
        )  # fmt: skip


class NorMuon(TwoRates):
    """NorMuon (arXiv 2510.05491, algorithm 1): Muon with equal shares of the step for all neurons, at the same norm of
    the whole. Equations: `lightspan.optim.reference.NorMuon`. For comparisons with its paper; `FactoredMuon` does the
    same for columns too.

    It costs a number a neuron more than Muon. As in the published code there is Nesterov momentum, which the paper has
    not, and the norm is that of Muon's direction; the paper's, 0.2 sqrt(out in), is what `convention="kimi"` gives an
    orthogonal matrix. The code takes each row of a convolution's kernels for a neuron, here that is a whole filter.

    Args:
        beta2: of the running mean of a neuron's squares, in [0, 1).
        momentum, nesterov, by_heads, convention, precision, other_lr, options: as in `Muon`.
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
        other_lr: float | Tensor = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        **options: Any,
    ) -> None:
        nu = None if nesterov else 1.0
        inner = NeuronNewtonSchulz(
            momentum=momentum, nu=nu, beta2=beta2, by_heads=by_heads, convention=convention, precision=precision
        )
        super().__init__(
            params, lr, other_lr=other_lr, basis=WholeBasis(), residual=None, inner=inner, refresh=Never(), betas=betas,
            eps=eps, **options,
        )  # fmt: skip


class FactoredMuon(TwoRates):
    """Muon with the factored second moment of Adafactor on its orthogonalised momentum, in 8 bits: about a seventh of
    AdamW's state, as `Muon` and `NorMuon` have in 8 bits too. Not published under this name; NorMuon (arXiv 2510.05491)
    is what it becomes with means over rows alone. Equations: `lightspan.optim.reference.FactoredMuon`.

    The steps are as long as those of AdamW at the same rate (`convention="kimi"`); 8 to 16 times its rate was best
    where it was searched, so divide a decay tuned for AdamW by that factor. The default `lr` is the rate whose loss, at
    worst, is least above the best of each search in benchmarks/results/quality.json; the default `other_lr` is halfway,
    by ratio, between the lowest and the highest of the best. Momentum is quasi-hyperbolic (arXiv 1810.06801): a longer
    memory with a larger share of the newest gradient than Nesterov's.

    Only the orthogonalisation knows heads: rows, columns and the norm are those of the whole parameter, so a fused
    weight of queries, keys and values takes other steps than the three apart.

    Args:
        beta2: of the running means of squares over rows and over columns, in [0, 1).
        moments: storage of the momentum, and of AdamW's moments in what is not taken.
        nu: in [0, 1], the share of the momentum in what is orthogonalised, the rest being the gradient: less than in
            Nesterov's momentum, whose share is `momentum`.
        momentum, by_heads, convention, precision, other_lr, options: as in `Muon`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 8e-3,
        momentum: float = 0.9,
        beta2: float = 0.95,
        nu: float = 0.6,
        by_heads: bool = True,
        convention: Convention = "kimi",
        precision: Precision = "float32",
        moments: MomentStorage = Int8Moments(),  # noqa: B008 - frozen
        other_lr: float | Tensor = 8e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        **options: Any,
    ) -> None:
        inner = FactoredNewtonSchulz(
            momentum=momentum, nu=nu, beta2=beta2, by_heads=by_heads, convention=convention, precision=precision
        )
        super().__init__(
            params, lr, other_lr=other_lr, basis=WholeBasis(), residual=None, inner=inner, moments=moments,
            refresh=Never(), betas=betas, eps=eps, **options,
        )  # fmt: skip


class Dion2(TwoRates):
    """Dion2 (arXiv 2512.16928): Muon on the quarter of the columns, or rows, with the largest momentum, which alone
    decays. Equations: `lightspan.optim.reference.Dion2`.

    It orthogonalises M x N / 4 numbers where Muon orthogonalises M x N: for large models, where that takes long. Its
    loss has not been measured here. A
    choice of the shorter side is made over all rows, on however many ranks they are; published code by default chooses
    along the side that is sharded, on each rank by itself. Of square matrices, columns are chosen here and rows there.

    Args:
        fraction: alpha, of the shorter side, in (0, 1].
        momentum: mu in [0, 1), what is left of a chosen column's momentum.
        convention, precision, other_lr, options: as in `Muon`; the default convention is that of the published code.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        fraction: float = 0.25,
        momentum: float = 0.95,
        convention: Convention = "dion",
        precision: Precision = "float32",
        other_lr: float | Tensor = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        **options: Any,
    ) -> None:
        inner = SelectiveNewtonSchulz(fraction=fraction, momentum=momentum, convention=convention, precision=precision)
        super().__init__(
            params, lr, other_lr=other_lr, basis=WholeBasis(), residual=None, inner=inner, refresh=Never(), betas=betas,
            eps=eps, **options,
        )  # fmt: skip
