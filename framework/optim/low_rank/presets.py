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

`lightspan.optim.muon` has the optimisers of whole matrices, of which `FactoredMuon` is the one to try first. Those here
keep less only with `moments=Int8Moments()` and a rank below a sixth of the shorter side (of square matrices; a third
where one side is four times the other); there, `LowRank` without a preset is what this project recommends. Each preset
equals the equations of its namesake in `lightspan.optim.reference`, which should be read first, except for what is said
here and in the classes. In the literature a frame's transpose is called projector, and `refresh` update_proj_gap.

Where settings of published code do not carry over unchanged:

- Refreshes take turns: the k-th of n matrices changes its frame first after k / n of `refresh`. Published code changes
  all frames in one step; `refresh=Every(200, staggered=False)` of `lightspan.optim.low_rank.bases` does so too.
- Weight decay comes before the step and is decoupled, as in AdamW; the GaLore and APOLLO packages decay after it.
- Fira's and APOLLO's limiter works on bias-corrected norms, their code's on uncorrected ones; None turns it off.
  `bound` is ours: no row moves farther than a stated multiple of AdamW's reach; `bound=None` is the paper's rule.
- What is not projected, vectors and matrices whose shorter side is not above `rank`, gets AdamW at the group's rate.
  The 1e-2 of GaLore, Fira and APOLLO is high for it, and their code does the same: set `other_lr` of
  `lightspan.optim.groups`, or give such parameters their own group. `Trion` has its own `other_lr`.
- Wide matrices are compressed on their rows and square ones on their columns, in all presets.

All accept the arguments of `LowRank`, except for the parts that define them. In a recipe a preset is a class path like
any other.
"""

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.optim.low_rank.bases import DCTBasis, GaussianBasis, PowerBasis, SVDBasis, Trigger
from lightspan.optim.low_rank.carries import Gather, Keep, Rotate
from lightspan.optim.low_rank.inner import NewtonSchulz
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.residuals import Apollo, ErrorFeedback, Fira
from lightspan.optim.matrices.conventions import Convention
from lightspan.optim.matrices.limits import require_valid
from lightspan.optim.two_rates import TwoRates


class GaLore(LowRank):
    """GaLore (Zhao et al. 2024, arXiv 2403.03507, algorithm 2): Adam on gradients projected to their top singular
    directions, with decoupled weight decay. `scale` is alpha. Equations: `lightspan.optim.reference.GaLore`.

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
    """Fira with Adam (Chen et al. 2024, arXiv 2410.01623, algorithm 1): GaLore, and the gradient outside the subspace,
    rescaled as inside it. Equations: `lightspan.optim.reference.FiraAdam`.

    For comparisons with its paper, and for its recipes: `LowRank` is Fira on a frame that costs no SVD.

    Args:
        scale: alpha, of the whole update, as in the paper.
        scale_residual: False is as in the published code: alpha scales U Q^T and R Q^T alone, so that the rescaled part
            is 1 / alpha times as long, and contains (1 - alpha) R Q^T. Its recipes need this: at the default their
            rates move weights only a quarter as far.
        limit, bound: of the norm-growth limiter and of a row, see `lightspan.optim.low_rank.residuals.Fira`.
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
        require_valid("FiraAdam", {"scale": scale})
        if scale > 1 and not scale_residual:
            raise UserError(
                f"FiraAdam scale={scale} must be in (0, 1] with scale_residual=False, where the rescaled part takes "
                "over what it leaves of the gradient in the frame; raise lr instead"
            )
        residual = Fira(limit, bound) if scale_residual else Fira(limit, bound, inside=scale)
        scale = scale if scale_residual else 1.0
        super().__init__(params, lr, rank, SVDBasis(), residual, refresh=refresh, scale=scale, **options)


class APOLLO(LowRank):
    """APOLLO (Zhu et al. 2024, arXiv 2412.05270, algorithm 1): whole gradients, scaled per channel of the longer side
    by Adam in a random subspace. Equations: `lightspan.optim.reference.APOLLO`.

    For comparisons with its paper, and where choosing a frame must cost nothing: its frames are random. `LowRank`
    reaches a lower loss at the same state.

    Args:
        scale: of the update. Published code takes the square root of what it calls scale: its 128 is 128**0.5 here.
        limit, bound: of the norm-growth limiter and of a row, see `lightspan.optim.low_rank.residuals.Apollo`.
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
    could not have reached its first with it; see `lightspan.optim.low_rank.carries.Rotate`. Equations:
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
    """DCT-AdamW (Modoranu et al. 2025, arXiv 2505.17967, algorithm 2): AdamW in the DCT columns that contain the most
    gradient, chosen in every step, with error feedback. Equations: `lightspan.optim.reference.DCTAdamW`.

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


class Trion(TwoRates, LowRank):
    """Trion (arXiv 2505.17967, algorithm 1): Dion with DCT columns and Newton-Schulz on the coordinates. Equations:
    `lightspan.optim.reference.Trion`.

    For matrices so large that orthogonalising whole ones takes too long; `lightspan.optim.muon.Muon` does that at the
    same state, to a lower loss.

    What is not projected gets AdamW at `other_lr`, see `lightspan.optim.two_rates.TwoRates`, with the published code's
    betas and eps. As published, there is no Nesterov momentum.

    Args:
        lr: of the projected matrices.
        other_lr: of everything else.
        momentum: mu in [0, 1), the share of the captured part that stays.
        norm: by which columns are compared; 2 loses least energy, the published code's default is 1.
        convention: factor by shape, see `lightspan.optim.matrices.conventions.shape_factor`.
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
