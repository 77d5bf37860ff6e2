"""What becomes of the part of the gradient outside the frame: dropped, rescaled into the update, or fed back.

The update of a matrix is `direction Q^T + scale o G`, with one scale per row: Fira's U Q^T + s o (G - R Q^T) is
(U - s o R) Q^T + s o G, so that there is one back-projection whatever the residual.

Shapes: B matrices of one shape, M rows (kept), N columns (projected), R rank.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightspan.errors import UserError
from lightspan.optim.layout import Layout, State
from lightspan.optim.sharding import Total, alone
from lightspan.triton_kernels.error_feedback import add_error, quantise_error, zero_error


class Residual(ABC):
    """A treatment of the residual. Parts that a treatment has no use for keep these defaults: no state, no feedback."""

    needs_energy = False
    """Whether `terms` reads the row norms of the gradient."""
    feeds_back = False
    """Whether the gradient that is projected contains an error kept from earlier steps."""
    needs_gradient = True
    """Whether the update reads the whole gradient in every step, not only its coordinates."""
    needs_orthonormal = True
    """Whether it holds for orthonormal frames only."""
    keeps_lost_moments = False
    """Whether `remember` wants what first moments lose when frames change."""

    def initial(self, layout: Layout) -> State:
        """State before the first step."""
        return {}

    def accumulate(self, gradients: list[Tensor], state: State, clip: Tensor) -> list[Tensor]:
        """What is projected in the place of the gradients, which are to be multiplied by `clip`, 0-d."""
        raise NotImplementedError(f"{type(self).__name__} feeds nothing back")

    @abstractmethod
    def terms(
        self,
        direction_BMR: Tensor,
        coordinates_BMR: Tensor,
        energy_BM: Tensor,
        state: State,
        total: Total = alone,
    ) -> tuple[Tensor, Tensor]:
        """(coefficients [B M R] or [B M 0], scale [B M] or [0 M]) of the update; may work in place on the direction.

        Args:
            energy_BM: squared row norms of the gradient, if `needs_energy`.
            total: continues sums over rows to those of other ranks.
        """

    def remember(
        self,
        accumulated: list[Tensor],
        coordinates_BMR: Tensor,
        frame_BNR: Tensor,
        lost: dict[int, Tensor],
        state: State,
        betas: tuple[float, float],
    ) -> None:
        """Stores what the step left out; `lost` are the parts [M N] of first moments that a change of frame left out,
        by matrix.
        """
        raise NotImplementedError(f"{type(self).__name__} feeds nothing back")


@dataclass(frozen=True)
class Dropped(Residual):
    """Only the gradient inside the frame counts (GaLore, arXiv 2403.03507)."""

    needs_gradient = False

    def terms(
        self,
        direction_BMR: Tensor,
        coordinates_BMR: Tensor,
        energy_BM: Tensor,
        state: State,
        total: Total = alone,
    ) -> tuple[Tensor, Tensor]:
        return direction_BMR, direction_BMR.new_empty(0, direction_BMR.shape[1])


def limit_growth(scale_BM: Tensor, norm_B: Tensor, limit: float, state: State) -> Tensor:
    """Row scales after the norm-growth limiter (Fira, arXiv 2410.01623, section 3.3): the norm of what is scaled grows
    by at most `limit` from one step to the next; the first step is not limited. Writes the norm to `state`.
    """
    previous_B, tiny = state["limiter"], torch.finfo(norm_B.dtype).tiny
    ceiling_B = torch.where(previous_B > 0, limit * previous_B, norm_B)
    factor_B = torch.where(norm_B > ceiling_B, ceiling_B / norm_B.clamp_min(tiny), 1.0)
    state["limiter"].copy_(norm_B * factor_B)
    return scale_BM * factor_B[:, None]


def _require_limit(owner: Residual, limit: float | None) -> None:
    if limit is not None and limit <= 1:
        raise UserError(f"{type(owner).__name__} limit={limit} must be above 1; at 1 or below, norms can only shrink")


@dataclass(frozen=True)
class Fira(Residual):
    """The gradient outside the frame, scaled row by row like the gradient inside it (Fira, arXiv 2410.01623, sections
    3.2 and 3.3).

    With coordinates r, direction u and residual E = G - r Q^T, row i of the update gains s_i E_i, s_i = |u_i| / |r_i|.
    A limiter holds |s o E|_F to at most `limit` times its value in the step before. The frame is orthonormal, so
    |E_i|^2 = |G_i|^2 - |r_i|^2: the residual's norm comes without forming the residual.

    Args:
        limit: gamma of the norm-growth limiter, > 1.
    """

    limit: float = 1.01

    needs_energy = True

    def __post_init__(self) -> None:
        _require_limit(self, self.limit)

    def initial(self, layout: Layout) -> State:
        return {"limiter": layout.zeros()}

    def terms(
        self,
        direction_BMR: Tensor,
        coordinates_BMR: Tensor,
        energy_BM: Tensor,
        state: State,
        total: Total = alone,
    ) -> tuple[Tensor, Tensor]:
        inside_BM = torch.linalg.vector_norm(coordinates_BMR, dim=-1)
        tiny = torch.finfo(energy_BM.dtype).tiny
        scale_BM = torch.linalg.vector_norm(direction_BMR, dim=-1) / inside_BM.clamp_min(tiny)
        outside_BM = (energy_BM - inside_BM.square()).clamp_min_(0)
        norm_B = total((scale_BM.square() * outside_BM).sum(dim=-1)).sqrt()
        scale_BM = limit_growth(scale_BM, norm_B, self.limit, state)
        return direction_BMR.addcmul_(coordinates_BMR, scale_BM[:, :, None], value=-1), scale_BM


@dataclass(frozen=True)
class Apollo(Residual):
    """The whole gradient, scaled as Adam scales its coordinates (APOLLO, arXiv 2412.05270, section 4).

    The frame serves to estimate scales only: nothing is lifted back, so it need not be orthonormal, and the update has
    full rank. s_i = |u_i| / |r_i| per row ("channel"), or |U| / |R| for the whole matrix ("tensor", APOLLO-Mini).

    Args:
        per: "channel" or "tensor".
        limit: gamma of the norm-growth limiter on s o G, > 1; None for none.
    """

    per: Literal["channel", "tensor"] = "channel"
    limit: float | None = 1.01

    needs_energy = True
    needs_orthonormal = False

    def __post_init__(self) -> None:
        _require_limit(self, self.limit)

    def initial(self, layout: Layout) -> State:
        return {} if self.limit is None else {"limiter": layout.zeros()}

    def terms(
        self,
        direction_BMR: Tensor,
        coordinates_BMR: Tensor,
        energy_BM: Tensor,
        state: State,
        total: Total = alone,
    ) -> tuple[Tensor, Tensor]:
        norms = [torch.linalg.vector_norm(x, dim=-1) for x in (direction_BMR, coordinates_BMR)]
        if self.per == "tensor":
            norms = [total(n.square().sum(dim=-1, keepdim=True)).sqrt().expand_as(n) for n in norms]
        scale_BM = norms[0] / norms[1].clamp_min(torch.finfo(energy_BM.dtype).tiny)
        if self.limit is not None:
            norm_B = total((scale_BM.square() * energy_BM).sum(dim=-1)).sqrt()
            scale_BM = limit_growth(scale_BM, norm_B, self.limit, state)
        return direction_BMR[..., :0], scale_BM


@dataclass(frozen=True)
class ErrorFeedback(Residual):
    """What a step leaves out is added to the gradient of the next: A = G + E, E <- A - (1 - kept) R Q^T.

    The state is of the weight's own size in the format chosen; int8 and int4 round to the nearest of 255 or 15 levels
    per row and 128 columns.

    Args:
        precision: storage format of E.
        kept: share of the captured part that stays in E, in [0, 1). 0 is error feedback (DCT-AdamW); mu > 0 makes E a
            momentum of which only the captured part decays (Trion and Dion, arXiv 2505.17967, section 4).
        of_moments: also what changes of frame cut off from Adam's first moment, times b1 / (1 - b1), so that nothing of
            the moving average is lost (generalised error feedback of LDAdam, arXiv 2410.16103, section 3).
    """

    precision: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    kept: float = 0.0
    of_moments: bool = False

    feeds_back = True

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

    def terms(
        self,
        direction_BMR: Tensor,
        coordinates_BMR: Tensor,
        energy_BM: Tensor,
        state: State,
        total: Total = alone,
    ) -> tuple[Tensor, Tensor]:
        return direction_BMR, direction_BMR.new_empty(0, direction_BMR.shape[1])

    def remember(
        self,
        accumulated: list[Tensor],
        coordinates_BMR: Tensor,
        frame_BNR: Tensor,
        lost: dict[int, Tensor],
        state: State,
        betas: tuple[float, float],
    ) -> None:
        for i, lost_MN in lost.items():
            accumulated[i].add_(lost_MN, alpha=betas[0] / (1 - betas[0]))
        quantise_error(accumulated, coordinates_BMR, frame_BNR, self.kept, state["error"], state["error_scale"])
