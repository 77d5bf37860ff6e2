"""What becomes of the part of the gradient outside the frame. `None` drops it, as GaLore does; `Fira` keeps it, without
state of its size.

Shapes: B matrices of one shape, M rows (kept), R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightspan.errors import UserError


@dataclass(frozen=True)
class Fira:
    """The gradient outside the frame, scaled row by row like the gradient inside it (Fira, arXiv 2410.01623, sections
    3.2 and 3.3).

    With coordinates r, Adam's direction u and residual E = G - r Q^T, row i of the update gains s_i E_i, s_i = |u_i| /
    |r_i|. A limiter holds |s o E|_F to at most `limit` times its value in the step before.

    Args:
        limit: gamma of the norm-growth limiter, > 1.
    """

    limit: float = 1.01

    def __post_init__(self) -> None:
        if self.limit <= 1:
            raise UserError(f"Fira limit={self.limit} must be above 1; at 1 or below, the residual can only shrink")

    def scales(
        self, direction_BMR: Tensor, coordinates_BMR: Tensor, energy_BM: Tensor, previous_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Row scales [B M] of the residual after the limiter, and the norms [B] to hand to the next step.

        Args:
            energy_BM: squared row norms of the whole gradient. The frame is orthonormal, so |E_i|^2 = |G_i|^2 -
                |r_i|^2: the residual's norm comes without forming the residual.
            previous_B: norms returned by the step before; 0 before the first, which is not limited.
        """
        inside_BM = coordinates_BMR.square().sum(dim=-1)
        tiny = torch.finfo(energy_BM.dtype).tiny
        scale_BM = direction_BMR.norm(dim=-1) / inside_BM.sqrt().clamp_min(tiny)
        norm_B = (scale_BM.square() * (energy_BM - inside_BM).clamp_min(0)).sum(dim=-1).sqrt()
        ceiling_B = torch.where(previous_B > 0, self.limit * previous_B, norm_B)
        factor_B = torch.where(norm_B > ceiling_B, ceiling_B / norm_B.clamp_min(tiny), 1.0)
        return scale_BM * factor_B[:, None], norm_B * factor_B
