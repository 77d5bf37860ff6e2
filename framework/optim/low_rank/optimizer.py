"""`LowRank`: an optimiser whose state lives in a low-dimensional subspace of each matrix; the rest gets AdamW."""

from collections.abc import Iterable
from typing import Any, Literal, Protocol

from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.optim.low_rank.bases import Basis, Every, PowerBasis, Trigger
from lightspan.optim.low_rank.core import BucketStep
from lightspan.optim.low_rank.inner import Adam, Inner
from lightspan.optim.low_rank.residuals import Fira, NoResidual, Residual
from lightspan.optim.low_rank.update_rule import UpdateRule, require_fit
from lightspan.optim.matrices.limits import refuse_unknown_settings, require_valid
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer
from lightspan.optim.matrices.moments import Float32Moments, MomentStorage
from lightspan.optim.matrices.stacks import Bucket, Layout, State


class Connection(Protocol):
    """What connects an optimiser with the gradients of a model, see `lightspan.optim.low_rank.gradients.attach`."""

    def detach(self) -> None:
        """Undoes it."""


class LowRank(MatrixOptimizer):
    """Optimises matrices inside subspaces, everything else with AdamW, in one step. State per M x N matrix (N <= M) of
    the default: 2 M R + N R numbers.

    A parameter is projected if `MatrixOptimizer`, which also says what groups can set, takes it for a matrix, and its
    shorter side is above `rank`. The longer side is kept.

    For models beside which a byte of state for each weight does not fit, or whole gradients do not (`backward`).
    Otherwise `lightspan.optim.muon.FactoredMuon`, which keeps that byte, reaches a lower loss (docs/benchmarks.md).

    With the defaults this is Fira (arXiv 2410.01623) on a tracked instead of a recomputed SVD basis.
    `lightspan.optim.low_rank.presets` has the published optimisers. The plain, slow equations:
    `lightspan.optim.reference.LowRank`.

    Any group can have its own rank, `scale` and numbers of the rule, such as `momentum`. What no loading can change
    (the parts, `refresh`) must be that of the saved run. Where a gradient has a lower rank than `rank`, some
    coordinates are nothing but rounding errors, which Adam brings to full length: losses of different numbers of ranks
    then differ in the third decimal place, as those of two machines would.

    Args:
        params: parameters, named parameters, or groups of either; `lightspan.optim.groups` makes good groups.
        lr: step size, >= 0, a float or a 0-d tensor. Adam's directions are normalised in coordinates, so rates are
            those of AdamW times a constant: about four was best at a width of 192 (docs/benchmarks.md). With
            inner=Adam(convention="adamw") that constant is in the steps, and AdamW's rate can be kept.
        rank: dimension of the subspace, >= 1; a group may have its own. State shrinks in proportion to rank / shorter
            side.
        basis: how frames are chosen; None means `PowerBasis()`. See `lightspan.optim.low_rank.bases`.
        residual: what happens to the gradient outside the frame; None drops it. See
        `lightspan.optim.low_rank.residuals`.
        inner: the rule in coordinates. See `lightspan.optim.low_rank.inner`.
        refresh: when a matrix' frame is chosen again: a number of steps, or a `Trigger`. Refreshes are staggered over
            the matrices, so that no single step does all of them; only the first step must.
        backward: "whole" uses gradients as usual. "hooks" projects each micro-batch's gradient to coordinates as soon
            as it exists and frees it; "projected" never forms it in nn.Linear. Both need `residual=None` and
            `attach` of `lightspan.optim.low_rank.gradients`; norms for `max_norm` are then computed inside the frames,
            and neither torch's clip_grad_norm_ nor GradScaler sees what is in coordinates: the former has no effect on
            it, the latter is refused.
        moments, scale, betas, eps, weight_decay, max_norm, check_finite, seed, offload, owners: as in
            `lightspan.optim.matrices.matrix_optimizer.MatrixOptimizer`. `scale` is GaLore's alpha, random frames are
            drawn from `seed`, and frames never live on the host. `owners` needs backward="whole".
    Raises: UserError also for parts that do not fit, and if `rank` is below the shorter side of no parameter, unless
        all groups have project=False.
    """

    KEPT_IN_COPIES: tuple[str, ...] = ("rule", "backward")
    attachment: Connection | None = None
    """What `attach` made, for another `backward` than "whole"; a copy has none."""

    @refuse_unknown_settings
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        rank: int = 64,
        basis: Basis | None = None,
        residual: Residual | None = Fira(),  # noqa: B008 - frozen
        inner: Inner = Adam(),  # noqa: B008 - frozen
        moments: MomentStorage = Float32Moments(),  # noqa: B008 - frozen
        refresh: int | Trigger = 50,
        scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        backward: Literal["whole", "hooks", "projected"] = "whole",
        check_finite: bool = True,
        seed: int = 0,
        offload: bool = False,
        owners: bool = False,
    ) -> None:
        require_valid(type(self).__name__, {"rank": rank, "backward": backward})
        trigger = Every(refresh) if isinstance(refresh, int) else refresh
        self.rule = UpdateRule(basis or PowerBasis(), residual or NoResidual(), inner, moments, trigger)
        self.backward = backward
        require_fit(self.rule, backward, offload, owners)
        self.settings, self.stays = {"rank": rank, **self.rule.settings()}, self.rule.of_frames
        super().__init__(
            params, lr, moments=moments, scale=scale, betas=betas, eps=eps, weight_decay=weight_decay,
            max_norm=max_norm, check_finite=check_finite, seed=seed, offload=offload, owners=owners,
        )  # fmt: skip

    def share_step(self, offload: bool = False) -> None:
        """Raises: UserError for parts that do not fit owners, or state on the host."""
        require_fit(self.rule, self.backward, offload, owners=True)
        super().share_step(offload)

    @property
    def projects_late(self) -> bool:  # type: ignore[override]
        return self.rule.residual.feeds_back

    def initial(self, layout: Layout) -> State:
        return self.rule.initial(layout)

    def operations(self, layout: Layout) -> int:
        there_and_back = 4 * layout.rows * layout.size * layout.rank
        return there_and_back + self.rule.inner.operations(layout)

    def step_of(self, bucket: Bucket) -> BucketStep:
        return BucketStep(bucket, self.rule)

    def fixed(self) -> dict[str, str]:
        return self.rule.fixed()

    def require_group(self, group: dict[str, Any], number: int) -> None:
        super().require_group(group, number)
        self.rule.of(group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for bucket in self._buckets.every:
            bucket.pending.clear()

    def _require_supported(self) -> None:
        if self.backward != "whole" and self.attachment is None:
            raise UserError(
                f"backward={self.backward!r} needs the model: call lightspan.optim.low_rank.gradients.attach(model, "
                "optimizer) before the first backward pass (SubspaceProjection and Method do)"
            )
        if self.backward != "whole" and hasattr(self, "grad_scale"):
            raise UserError(
                f"backward={self.backward!r} keeps coordinates that torch.amp.GradScaler does not see, so they would "
                "stay scaled; train in bfloat16, which needs no scaling, or set backward='whole'"
            )
        super()._require_supported()

    def _needs_energy(self) -> bool:
        """Also for a residual that rescales, which needs row norms."""
        return super()._needs_energy() or (self.backward == "whole" and self.rule.residual.rescales)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Makes GradScaler set `grad_scale` here instead of dividing gradients: a sign that it is used."""
        return self.backward != "whole"
