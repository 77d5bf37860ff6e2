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

All take what `LowRank` takes; options given here are bound first.
"""

from collections.abc import Iterable
from typing import Any, Literal

from lightspan.optim.bases import DCTBasis, GaussianBasis, PowerBasis, SVDBasis
from lightspan.optim.carries import Gather, Keep, Rotate
from lightspan.optim.inner import NewtonSchulz
from lightspan.optim.low_rank import LowRank
from lightspan.optim.residuals import Apollo, ErrorFeedback, Fira


def galore(
    params: Iterable[Any],
    lr: float = 1e-2,
    rank: int = 128,
    refresh: int = 200,
    scale: float = 0.25,
    **options: Any,
) -> LowRank:
    """GaLore (Zhao et al. 2024, arXiv 2403.03507, algorithm 2), with decoupled weight decay."""
    return LowRank(params, lr, rank, basis=SVDBasis(), residual=None, refresh=refresh, scale=scale, **options)


def fira(
    params: Iterable[Any],
    lr: float = 1e-2,
    rank: int = 128,
    refresh: int = 200,
    scale: float = 0.25,
    limit: float = 1.01,
    **options: Any,
) -> LowRank:
    """Fira (Chen et al. 2024, arXiv 2410.01623, algorithm 1). `limit` is gamma of the norm-growth limiter."""
    return LowRank(params, lr, rank, basis=SVDBasis(), residual=Fira(limit), refresh=refresh, scale=scale, **options)


def apollo(
    params: Iterable[Any],
    lr: float = 1e-2,
    rank: int = 256,
    refresh: int = 200,
    scale: float = 1.0,
    limit: float | None = 1.01,
    **options: Any,
) -> LowRank:
    """APOLLO (Zhu et al. 2024, arXiv 2412.05270, algorithm 1), scales per channel of the longer side."""
    residual = Apollo("channel", limit)
    return LowRank(params, lr, rank, basis=GaussianBasis(), residual=residual, refresh=refresh, scale=scale, **options)


def apollo_mini(
    params: Iterable[Any],
    lr: float = 1e-2,
    rank: int = 1,
    refresh: int = 200,
    scale: float = 128.0**0.5,
    limit: float | None = 1.01,
    **options: Any,
) -> LowRank:
    """APOLLO-Mini (arXiv 2412.05270, section 4.3): rank 1, one scale per matrix, alpha = sqrt(128)."""
    residual = Apollo("tensor", limit)
    return LowRank(params, lr, rank, basis=GaussianBasis(), residual=residual, refresh=refresh, scale=scale, **options)


def ldadam(
    params: Iterable[Any],
    lr: float = 1e-3,
    rank: int = 128,
    betas: tuple[float, float] = (0.908, 0.99),
    rho: float = 0.908,
    **options: Any,
) -> LowRank:
    """LDAdam (Robert et al. 2024, arXiv 2410.16103, algorithm 1): a new frame and rotated moments in every step. Its
    first frames come from power steps instead of an SVD. `rho` is the share of the momentum that frames follow.
    """
    basis, residual = PowerBasis(momentum=rho, carry=Rotate(floor=False)), ErrorFeedback(of_moments=True)
    return LowRank(params, lr, rank, basis=basis, residual=residual, refresh=1, betas=betas, **options)


def dct_adamw(
    params: Iterable[Any],
    lr: float = 1e-3,
    rank: int = 128,
    refresh: int = 1,
    error_feedback: Literal["float32", "bfloat16", "int8", "int4"] | None = "int8",
    rotate: bool = True,
    norm: Literal[1, 2] = 2,
    **options: Any,
) -> LowRank:
    """DCT-AdamW (Modoranu et al. 2025, arXiv 2505.17967, algorithm 2).

    Args:
        error_feedback: storage format of the error, None for none.
        rotate: whether moments follow their columns; otherwise they stay in their slots, as the published code's
            default has it.
        norm: by which columns are compared; 2 loses least energy, the published code's default is 1.
    """
    basis = DCTBasis(norm=norm, carry=Gather(own_age=False) if rotate else Keep())
    residual = None if error_feedback is None else ErrorFeedback(error_feedback)
    return LowRank(params, lr, rank, basis=basis, residual=residual, refresh=refresh, **options)


def trion(
    params: Iterable[Any],
    lr: float = 2e-2,
    rank: int = 128,
    momentum: float = 0.95,
    convention: Literal["kj", "kimi", "dion", "none"] = "kj",
    **options: Any,
) -> LowRank:
    """Trion (arXiv 2505.17967, algorithm 1): Dion with DCT columns and Newton-Schulz on the coordinates.

    Args:
        momentum: mu in [0, 1), the share of the captured part that stays.
        convention: factor by shape, see `NewtonSchulz`.
    """
    residual, inner = ErrorFeedback(kept=momentum), NewtonSchulz(scale=convention)
    return LowRank(params, lr, rank, basis=DCTBasis(carry=Keep()), residual=residual, inner=inner, refresh=1, **options)
