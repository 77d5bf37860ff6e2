"""What becomes of the part of the gradient outside the frame: dropped, rescaled into the update, or fed back.

The update of a matrix is `direction Q^T + scale o G`, with one scale per row: Fira's U Q^T + s o (G - R Q^T) is
(U - s o R) Q^T + s o G, so that there is one back-projection for every residual.

Shapes: B matrices of one shape, M rows (kept), N columns (projected), R rank.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.sharded import Total
from lightspan.optim.matrices.stacks import Layout, State
from lightspan.triton_kernels.error_feedback import add_error, quantise_error, zero_error


@dataclass(frozen=True)
class Terms:
    """What a treatment of the residual knows of a step.

    Args:
        direction_BMR: what the inner rule made of the coordinates.
        coordinates_BMR: of the gradient.
        energy_BM: squared row norms of the gradient.
        layout: that of the matrices; its `total` extends sums over rows to those of other ranks.
    """

    direction_BMR: Tensor
    coordinates_BMR: Tensor
    energy_BM: Tensor
    layout: Layout


@dataclass(frozen=True)
class LostMoments:
    """What changes of frame leave out of first moments, before old^T - after new^T [M N], as factors; both are zero for
    matrices that keep their frame.

    Args:
        moments_BMK: after and -before beside each other, K = 2 R; used up by `Residual.remember`.
        frames_BNK: new and old ones.
    """

    moments_BMK: Tensor
    frames_BNK: Tensor


class Residual:
    """A treatment of the residual. Parts that a treatment does not need keep these defaults: no state, no rescaling, no
    feedback.
    """

    rescales = False
    """Whether the update contains the whole gradient, scaled by row, as `terms` says. It then needs its row norms."""
    feeds_back = False
    """Whether the gradient that is projected contains an error kept from earlier steps. It is then projected in the
    second half of a step, after clipping, those of one bucket at a time.
    """
    of_groups: ClassVar[tuple[str, ...]] = ()
    """Names of its settings that every parameter group has too, see `lightspan.optim.low_rank.inner.Inner.of_groups`.
    """
    needs_gradient = True
    """Whether the update reads the whole gradient in every step, not only its coordinates."""
    needs_orthonormal = True
    """Whether it is valid only for orthonormal frames."""
    keeps_lost_moments = False
    """Whether `remember` wants what first moments lose when frames change."""

    def initial(self, layout: Layout) -> State:
        """State before the first step."""
        return {}

    def accumulate(self, gradients: list[Tensor], state: State, clip: Tensor) -> list[Tensor]:
        """What is projected instead of the gradients, which are to be multiplied by `clip`, 0-d."""
        raise NotImplementedError(f"{type(self).__name__} feeds nothing back")

    def terms(self, given: Terms, state: State) -> tuple[Tensor, Tensor]:
        """(coefficients [B M R] or [B M 0], scale [B M]) of the update; may change the direction in place."""
        raise NotImplementedError(f"{type(self).__name__} rescales nothing")

    def remember(
        self,
        accumulated: list[Tensor],
        coordinates_BMR: Tensor,
        frame_BNR: Tensor,
        lost: LostMoments | None,
        state: State,
        betas: tuple[float, float],
    ) -> None:
        """Stores what the step left out; `lost` is what changes of frame left out of first moments."""
        raise NotImplementedError(f"{type(self).__name__} feeds nothing back")


@dataclass(frozen=True)
class NoResidual(Residual):
    """Only the gradient inside the frame counts, the rest is dropped (GaLore, arXiv 2403.03507)."""

    needs_gradient = False


EPSILON = 1e-8
"""Added to norms in denominators, as in the published code of Fira and APOLLO; it is also Adam's."""


def row_scales(direction: Tensor, inside: Tensor, outside: Tensor, layout: Layout, bound: float | None) -> Tensor:
    """|u| / (|r| + EPSILON), what Adam does to the length of a row's coordinates. Finite for finite norms.

    It is the estimate of what Adam would do to the row's `outside`, and it is valid as long as the frame captures a
    fair share of the row. For an isotropic gradient |r| is about sqrt(R / N) of the row. A row whose gradient turns out
    of the frame has |r| near 0 and a momentum that keeps |u| up: the quotient is then meaningless, and times `outside`
    there is no limit to it. So |r| counts as no less than sqrt(R / N) |outside| / bound, which gives

        scale |outside| <= bound sqrt(N / R) |u|

    Adam's coordinates are at most A = `inner.largest_direction`, so |u| <= A sqrt(R): what is rescaled is at most
    `bound` times as long as the longest row that AdamW could make of N numbers at the same rate, A sqrt(N).

    Args:
        direction, inside, outside: norms of u, r and of what is rescaled, [B M].
    """
    below = inside + EPSILON
    if bound is not None:
        # fmax: for a row whose squares overflow, `outside` may be infinity minus infinity; its scale is 0, as in AdamW.
        below = torch.fmax(below, outside * ((layout.rank / layout.size) ** 0.5 / bound))
    # Rows of zeros with a huge momentum: infinity times zero would be NaN.
    return (direction / below).clamp_max_(torch.finfo(below.dtype).max)


def limit_growth(scale_BM: Tensor, rescaled_BM: Tensor, limit: float, state: State, total: Total) -> Tensor:
    """Row scales after the norm-growth limiter (Fira, arXiv 2410.01623, section 4.2, equation 12): the norm of what is
    rescaled grows by at most `limit` from one step to the next. Writes the norm to `state`, always a finite number.

    The first step is not limited. A step that rescales nothing, such as for a gradient of zeros, does not count: the
    next one is compared with the last that did. (Published code uses its norm of zero as the norm to grow from, after
    which some two thousand steps pass until the part matters again.)

    Args:
        rescaled_BM: scale times the norm of what is scaled, by row.
    """
    norm_B, previous_B = total(rescaled_BM.square().sum(dim=-1)).sqrt(), state["limiter"]
    ceiling_B = torch.where(previous_B > 0, limit * previous_B, torch.inf)
    factor_B = torch.where(norm_B > ceiling_B, ceiling_B / norm_B, 1.0)
    reached_B = torch.minimum(norm_B, ceiling_B).clamp_max_(torch.finfo(norm_B.dtype).max)
    state["limiter"].copy_(torch.where(norm_B > 0, reached_B, previous_B))
    return scale_BM * factor_B[:, None]


def _require_above_one(owner: Residual, **limits: float | None) -> None:
    for name, value in limits.items():
        if value is not None and not value > 1:
            shrinks, binds = "at 1 or below, norms can only shrink", "1 already limits an isotropic gradient"
            why = shrinks if name == "limit" else binds
            raise UserError(f"{type(owner).__name__} {name}={value} must be above 1 ({why}), or None for none")


class _Rescaling(Residual):
    """What residuals that scale rows share: a bound, a limiter, and its state."""

    limit: float | None
    bound: float | None
    rescales = True

    def __post_init__(self) -> None:
        _require_above_one(self, limit=self.limit, bound=self.bound)

    def initial(self, layout: Layout) -> State:
        return {} if self.limit is None else {"limiter": layout.zeros()}

    def _limited(self, scale_BM: Tensor, outside_BM: Tensor, state: State, layout: Layout) -> Tensor:
        if self.limit is None:
            return scale_BM
        return limit_growth(scale_BM, scale_BM * outside_BM, self.limit, state, layout.total)


@dataclass(frozen=True)
class Fira(_Rescaling):
    """The gradient outside the frame, scaled row by row like the gradient inside it (Fira, arXiv 2410.01623, sections
    4.1 and 4.2, equations 9 to 12).

    With coordinates r, direction u and residual E = G - r Q^T, row i of the update gains s_i E_i, s_i = |u_i| /
    (|r_i| + 1e-8). A limiter holds |s o E|_F to at most `limit` times its value in the step before. The frame is
    orthonormal, so |E_i|^2 = |G_i|^2 - |r_i|^2: the residual's norm is known without forming the residual.

    A row moves at most 1 + `bound` times as far as AdamW could move it at the same rate, times `scale` of `LowRank` and
    its rule's factor, whatever its gradients: including rows that die and come back, or turn out of the frame. See
    `row_scales`.

    Args:
        limit: gamma of the norm-growth limiter, > 1; None for none.
        bound: s_i |E_i| is at most `bound` sqrt(N / R) |u_i|, which is `bound` times what it is for an isotropic
            gradient; > 1. It is not in the paper. docs/optimisers.md says how often it acts. None is the paper's
            rule, in which nothing bounds a step.
        inside: factor on what is inside the frame, u Q^T and r Q^T alike. Published code has alpha = 0.25 here and
            scales nothing else, the paper scales the whole update, which is `scale` of `LowRank`.
    """

    limit: float | None = 1.01
    bound: float | None = 4.0
    inside: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.inside <= 1:
            raise UserError(f"Fira inside={self.inside} must be in (0, 1]")

    def terms(self, given: Terms, state: State) -> tuple[Tensor, Tensor]:
        direction_BMR, coordinates_BMR = given.direction_BMR, given.coordinates_BMR
        direction_BM, inside_BM = (torch.linalg.vector_norm(x, dim=-1) for x in (direction_BMR, coordinates_BMR))
        # |G - a r Q^T|^2 = |G|^2 - a (2 - a) |r|^2
        taken = self.inside * (2 - self.inside)
        outside_BM = (given.energy_BM - taken * inside_BM.square()).clamp_min_(0).sqrt_()
        scale_BM = row_scales(direction_BM, inside_BM, outside_BM, given.layout, self.bound)
        scale_BM = self._limited(scale_BM, outside_BM, state, given.layout)
        coefficients_BMR = direction_BMR.addcmul_(coordinates_BMR, scale_BM[:, :, None], value=-1)
        return coefficients_BMR if self.inside == 1 else coefficients_BMR.mul_(self.inside), scale_BM


@dataclass(frozen=True)
class Apollo(_Rescaling):
    """The whole gradient, scaled as Adam scales its coordinates (APOLLO, arXiv 2412.05270, section 4).

    The frame is only used to estimate scales: nothing is lifted back, so it need not be orthonormal, and the update has
    full rank. s_i = |u_i| / (|r_i| + 1e-8) per row ("channel"), or s = |U| / (|R| + 1e-8) for the whole matrix
    ("tensor", APOLLO-Mini).

    A row moves at most `bound` times as far as AdamW could move it at the same rate, times `scale` of `LowRank` and its
    rule's factor, whatever its gradients; with "tensor" this holds for the norm of the whole matrix, of which one row
    can get all. See `row_scales`.

    Args:
        per: "channel" or "tensor".
        limit: gamma of the norm-growth limiter on s o G, > 1; None for none.
        bound: s_i |G_i| is at most `bound` sqrt(N / R) |u_i|, > 1; with "tensor" the same of whole matrices. Not in the
            paper; None for none. When it acts: see `Fira`.
    """

    per: Literal["channel", "tensor"] = "channel"
    limit: float | None = 1.01
    bound: float | None = 4.0

    needs_orthonormal = False

    def terms(self, given: Terms, state: State) -> tuple[Tensor, Tensor]:
        rows_BM, layout = given.energy_BM.sqrt(), given.layout
        norms = [torch.linalg.vector_norm(x, dim=-1) for x in (given.direction_BMR, given.coordinates_BMR)]
        norms.append(rows_BM)
        if self.per == "tensor":
            squares_3B1 = torch.stack(norms).square().sum(dim=-1, keepdim=True)
            norms = list(layout.total(squares_3B1).sqrt().expand(-1, -1, layout.rows))
        moved_BM, inside_BM, whole_BM = norms
        scale_BM = row_scales(moved_BM, inside_BM, whole_BM, layout, self.bound)
        return given.direction_BMR[..., :0], self._limited(scale_BM, rows_BM, state, layout)


@dataclass(frozen=True)
class ErrorFeedback(Residual):
    """What a step leaves out is added to the next gradient: A = G + E, E <- A - (1 - kept) R Q^T.

    The state has the size of the weight in the chosen format; int8 and int4 round to the nearest of 255 or 15 levels
    per row and 128 columns.

    Args:
        precision: storage format of E.
        kept: share of the captured part that stays in E, in [0, 1). 0 is error feedback (DCT-AdamW); mu > 0 makes E a
            momentum of which only the captured part decays (Trion and Dion, arXiv 2505.17967, section 4).
        of_moments: also what changes of frame remove from Adam's first moment, times b1 / (1 - b1), so that nothing of
            the moving average is lost (generalised error feedback of LDAdam, arXiv 2410.16103, section 3).
    """

    precision: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    kept: float = 0.0
    of_moments: bool = False

    feeds_back = True
    of_groups: ClassVar[tuple[str, ...]] = ("kept",)

    def __post_init__(self) -> None:
        if not 0 <= self.kept < 1:
            raise UserError(f"ErrorFeedback kept={self.kept} must be in [0, 1)")

    @property
    def keeps_lost_moments(self) -> bool:  # type: ignore[override]
        return self.of_moments

    def initial(self, layout: Layout) -> State:
        wide = self.precision == "float32" and layout.dtype == torch.float64
        storage = "float64" if wide else self.precision
        codes_BMK, scales_BMS = zero_error(layout.batch, layout.rows, layout.size, storage, layout.device)
        return {"error": codes_BMK, "error_scale": scales_BMS}

    def accumulate(self, gradients: list[Tensor], state: State, clip: Tensor) -> list[Tensor]:
        return list(add_error(gradients, state["error"], state["error_scale"], clip))

    def remember(
        self,
        accumulated: list[Tensor],
        coordinates_BMR: Tensor,
        frame_BNR: Tensor,
        lost: LostMoments | None,
        state: State,
        betas: tuple[float, float],
    ) -> None:
        if lost is not None:
            # A - (1 - kept) R Q^T + c (before old^T - after Q^T) is one product of twice the rank.
            rank, both_BMK, frames_BNK = coordinates_BMR.shape[2], lost.moments_BMK, lost.frames_BNK
            both_BMK.mul_(betas[0] / (1 - betas[0]) / (1 - self.kept))[..., :rank].add_(coordinates_BMR)
            frames_BNK[..., :rank] = frame_BNR
            coordinates_BMR, frame_BNR = both_BMK, frames_BNK
        quantise_error(accumulated, coordinates_BMR, frame_BNR, self.kept, state["error"], state["error_scale"])
