"""Published low-rank optimisers as choices of `LowRank`'s switches, with the papers' defaults.

| preset       | frame                     | moments at a change | residual                    | rule          |
|--------------|---------------------------|---------------------|-----------------------------|---------------|
| `GaLore`     | SVD, every 200 steps      | stay                | dropped                     | Adam          |
| `FiraAdam`   | SVD, every 200 steps      | stay                | scaled per row, limited     | Adam          |
| `APOLLO`     | Gaussian, every 200 steps | stay                | scales the whole gradient   | Adam          |
| `APOLLOMini` | Gaussian, rank 1          | stay                | one scale for the matrix    | Adam          |
| `LDAdam`     | power step, every step    | rotate              | generalised error feedback  | Adam          |
| `DCTAdamW`   | DCT columns, every step   | gather              | error feedback              | Adam          |
| `Trion`      | DCT columns, every step   | -                   | momentum as error feedback  | Newton-Schulz |

Each equals the equations of its namesake in `lightspan.optim.reference`, which should be read first, except for what is
said here and in the classes. In the literature a frame's transpose is called projector, and `refresh` update_proj_gap.
`LowRank` without a preset is what this project recommends.

Where settings of published code do not carry over unchanged:

- Refreshes take turns: the k-th of n matrices changes its frame first after k / n of `refresh`. Published code changes
  all frames in one step; `refresh=Every(200, staggered=False)` of `lightspan.optim.bases` does so too.
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

from lightspan.errors import UserError
from lightspan.optim.bases import DCTBasis, GaussianBasis, PowerBasis, SVDBasis, Trigger
from lightspan.optim.carries import Gather, Keep, Rotate
from lightspan.optim.inner import NewtonSchulz
from lightspan.optim.low_rank import LowRank
from lightspan.optim.residuals import Apollo, ErrorFeedback, Fira
from lightspan.optim.settings import require_sound


class GaLore(LowRank):
    """GaLore (Zhao et al. 2024, arXiv 2403.03507, algorithm 2), with decoupled weight decay. `scale` is alpha.
    Equations: `lightspan.optim.reference.GaLore`.

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
    `lightspan.optim.reference.APOLLOMini`.
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


class Trion(LowRank):
    """Trion (arXiv 2505.17967, algorithm 1): Dion with DCT columns and Newton-Schulz on the coordinates. Equations:
    `lightspan.optim.reference.Trion`.

    Newton-Schulz needs a rate that is far too high for AdamW, which steps what is not projected: vectors, matrices
    whose shorter side is not above `rank`, and groups with project=False. If a group has no `lr` of its own, these
    get `other_lr`, in a separate group after it, which keeps that rate under this name. A schedule that takes one
    rate for all groups, such as OneCycleLR(max_lr=0.02), would give both the same: the first step refuses it. Give it a
    list, max_lr=[group["lr"] for group in optimizer.param_groups]; schedules that multiply rates keep their ratio.

    Betas and eps of what is not projected are the published code's. As published, there is no Nesterov momentum.

    Args:
        lr: of the projected matrices.
        other_lr: of everything else, unless a group has `lr`; >= 0.
        momentum: mu in [0, 1), the share of the captured part that stays.
        norm: by which columns are compared; 2 loses least energy, the published code's default is 1.
        convention: factor by shape, see `NewtonSchulz`.
    """

    KEPT_IN_COPIES = (*LowRank.KEPT_IN_COPIES, "other_lr")
    _rates_seen = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-2,
        rank: int = 128,
        momentum: float = 0.95,
        norm: Literal[1, 2] = 2,
        convention: Literal["kj", "kimi", "dion", "none"] = "kj",
        other_lr: float | Tensor = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        **options: Any,
    ) -> None:
        require_sound("Trion", {"other_lr": other_lr})
        self.other_lr = other_lr
        basis, residual = DCTBasis(norm=norm, carry=Keep()), ErrorFeedback(kept=momentum)
        inner = NewtonSchulz(scale=convention)
        super().__init__(params, lr, rank, basis, residual, inner, refresh=1, betas=betas, eps=eps, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds the group, or two: in a group without a rate, what is not projected gets `other_lr`."""
        has_rate = "lr" in param_group
        super().add_param_group(dict(param_group))  # a copy: torch writes defaults into what it gets
        if has_rate:
            return
        group = self.param_groups.pop()
        projected = [self.projected(p, group) for p in group["params"]]
        for wanted, rate in ((True, group["lr"]), (False, self.other_lr)):
            members = [i for i, is_projected in enumerate(projected) if is_projected == wanted]
            if members:
                lists: dict[str, Any] = {
                    key: [group[key][i] for i in members] for key in ("params", "param_names") if key in group
                }
                own: dict[str, Any] = {} if wanted else {"other_lr": rate}
                if not wanted and "name" in group and any(projected):  # names distinguish groups, also in logs of rates
                    own["name"] = f"{group['name']}-other"
                self.param_groups.append({**group, **lists, "lr": rate, **own})

    def step(self, closure: Any = None) -> Any:
        """As `LowRank.step`. Raises: UserError in the first step if a schedule has given both groups the same rate."""
        if not self._rates_seen:
            self._refuse_one_rate()
            self._rates_seen = True
        return super().step(closure)

    def _refuse_one_rate(self) -> None:
        for at, group in enumerate(self.param_groups):
            before = self.param_groups[at - 1]
            if "other_lr" not in group or at == 0 or "other_lr" in before:
                continue
            peak, other = _peak(before), _peak(group)
            if 0 < peak == other != float(group["other_lr"]):
                raise UserError(
                    f"a schedule gives AdamW's group of Trion the rate of Newton-Schulz, {peak:g}, instead of "
                    f"other_lr={float(group['other_lr']):g}; give the schedule a list of rates, one for each group, "
                    'such as max_lr=[group["lr"] for group in optimizer.param_groups]'
                )


def _peak(group: dict[str, Any]) -> float:
    """The highest rate that a group is known to get: schedules store theirs under these names."""
    return max(float(group.get(name, 0.0)) for name in ("lr", "initial_lr", "max_lr"))
