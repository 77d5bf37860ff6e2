"""Published low-rank optimisers as choices of `LowRank`'s switches, with the papers' defaults.

| preset      | frame                     | moments at a change | residual                    | rule          |
|-------------|---------------------------|---------------------|-----------------------------|---------------|
| galore      | SVD, every 200 steps      | stay                | dropped                     | Adam          |
| fira        | SVD, every 200 steps      | stay                | scaled per row, limited     | Adam          |
| apollo      | Gaussian, every 200 steps | stay                | scales the whole gradient   | Adam          |
| apollo_mini | Gaussian, rank 1          | stay                | one scale for the matrix    | Adam          |
| ldadam      | power step, every step    | rotate              | generalised error feedback  | Adam          |
| dct_adamw   | DCT columns, every step   | gather              | error feedback              | Adam          |
| trion       | DCT columns, every step   | -                   | momentum as error feedback  | Newton-Schulz |

Each equals its paper's equations (tests/optim/test_presets.py). Where published code departs from its paper, the paper
is followed. `LowRank` without a preset is what this project recommends.

All take what `LowRank` takes, but for the parts that make them what they are. In a recipe a preset is a class path like
any other; the lower-case names are theirs in tables and result files.
"""

from collections.abc import Iterable
from typing import Any, Literal

from lightspan.optim.bases import DCTBasis, GaussianBasis, PowerBasis, SVDBasis
from lightspan.optim.carries import Gather, Keep, Rotate
from lightspan.optim.inner import NewtonSchulz
from lightspan.optim.low_rank import LowRank
from lightspan.optim.residuals import Apollo, ErrorFeedback, Fira


class GaLore(LowRank):
    """GaLore (Zhao et al. 2024, arXiv 2403.03507, algorithm 2), with decoupled weight decay."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        rank: int = 128,
        refresh: int = 200,
        scale: float = 0.25,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, rank, SVDBasis(), None, refresh=refresh, scale=scale, **options)


class FiraAdam(LowRank):
    """Fira with Adam (Chen et al. 2024, arXiv 2410.01623, algorithm 1). `limit` is gamma of the norm-growth limiter."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        rank: int = 128,
        refresh: int = 200,
        scale: float = 0.25,
        limit: float = 1.01,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, rank, SVDBasis(), Fira(limit), refresh=refresh, scale=scale, **options)


class APOLLO(LowRank):
    """APOLLO (Zhu et al. 2024, arXiv 2412.05270, algorithm 1), scales per channel of the longer side."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        rank: int = 256,
        refresh: int = 200,
        scale: float = 1.0,
        limit: float | None = 1.01,
        **options: Any,
    ) -> None:
        residual = Apollo("channel", limit)
        super().__init__(params, lr, rank, GaussianBasis(), residual, refresh=refresh, scale=scale, **options)


class APOLLOMini(LowRank):
    """APOLLO-Mini (arXiv 2412.05270, section 4.3): rank 1, one scale per matrix, alpha = sqrt(128)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        rank: int = 1,
        refresh: int = 200,
        scale: float = 128.0**0.5,
        limit: float | None = 1.01,
        **options: Any,
    ) -> None:
        residual = Apollo("tensor", limit)
        super().__init__(params, lr, rank, GaussianBasis(), residual, refresh=refresh, scale=scale, **options)


class LDAdam(LowRank):
    """LDAdam (Robert et al. 2024, arXiv 2410.16103, algorithm 1): a new frame and rotated moments in every step. Its
    first frames come from power steps instead of an SVD. `rho` is the share of the momentum that frames follow.
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
    """DCT-AdamW (Modoranu et al. 2025, arXiv 2505.17967, algorithm 2).

    Args:
        error_feedback: storage format of the error, None for none.
        rotate: whether moments follow their columns; otherwise they stay in their slots, as the published code's
            default has it.
        norm: by which columns are compared; 2 loses least energy, the published code's default is 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int = 128,
        refresh: int = 1,
        error_feedback: Literal["float32", "bfloat16", "int8", "int4"] | None = "int8",
        rotate: bool = True,
        norm: Literal[1, 2] = 2,
        **options: Any,
    ) -> None:
        basis = DCTBasis(norm=norm, carry=Gather(own_age=False) if rotate else Keep())
        residual = None if error_feedback is None else ErrorFeedback(error_feedback)
        super().__init__(params, lr, rank, basis, residual, refresh=refresh, **options)


class Trion(LowRank):
    """Trion (arXiv 2505.17967, algorithm 1): Dion with DCT columns and Newton-Schulz on the coordinates.

    Args:
        momentum: mu in [0, 1), the share of the captured part that stays.
        convention: factor by shape, see `NewtonSchulz`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-2,
        rank: int = 128,
        momentum: float = 0.95,
        convention: Literal["kj", "kimi", "dion", "none"] = "kj",
        **options: Any,
    ) -> None:
        residual, inner = ErrorFeedback(kept=momentum), NewtonSchulz(scale=convention)
        super().__init__(params, lr, rank, DCTBasis(carry=Keep()), residual, inner, refresh=1, **options)


galore, fira, apollo, apollo_mini = GaLore, FiraAdam, APOLLO, APOLLOMini
ldadam, dct_adamw, trion = LDAdam, DCTAdamW, Trion
