"""One step of a low-rank optimiser on a list of matrices of one shape. Pure in everything but the state it is handed.

    R = G Q                         coordinates of the gradient (pull)
    U = Adam(R)                     direction, moments of shape M x R
    W <- (1 - lr wd) W - lr (U Q^T + s o (G - R Q^T))
with Q chosen anew by `basis` for the matrices that are due, and s from `residual` (0 without one). The last line is
computed as U Q^T + s o (G - R Q^T) = (U - s o R) Q^T + s o G: one back-projection, whatever the residual.

Shapes: B matrices, M rows (the kept, longer side), N columns (the projected side), R rank. Wide matrices come in
transposed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightspan.optim.bases import Basis, BasisState, Moments
from lightspan.optim.residuals import Fira
from lightspan.subspaces.frames import pull
from lightspan.triton_kernels.low_rank_adam import low_rank_adam


@dataclass
class LowRankState:
    """Stacked state of B matrices: tensors only, each with B as its first axis. `limiter_B` is used by residuals
    alone.
    """

    moments: Moments
    basis: BasisState
    limiter_B: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By the names under which an optimiser saves them."""
        moments = self.moments
        named = {"exp_avg": moments.first_BMR, "exp_avg_sq": moments.second_BMR, "age": moments.age_BR}
        return {**named, "limiter": self.limiter_B, **{f"basis.{key}": value for key, value in self.basis.items()}}

    @staticmethod
    def from_tensors(named: dict[str, Tensor]) -> "LowRankState":
        """Inverse of `tensors`."""
        basis = {key.removeprefix("basis."): value for key, value in named.items() if key.startswith("basis.")}
        return LowRankState(Moments(named["exp_avg"], named["exp_avg_sq"], named["age"]), basis, named["limiter"])

    def part(self, index: Tensor) -> "LowRankState":
        """A copy that holds the matrices `index` only."""
        return LowRankState.from_tensors({key: value[index] for key, value in self.tensors().items()})

    def write_part(self, index: Tensor, part: "LowRankState") -> None:
        """Writes a part back in place, so that views of this state stay views."""
        mine = self.tensors()
        for key, value in part.tensors().items():
            mine[key][index] = value


def initial_state(
    batch: int, rows: int, size: int, rank: int, basis: Basis, seed: int, *, dtype: torch.dtype, device: torch.device
) -> LowRankState:
    """Zero moments, age 0, and the basis' own start."""
    zeros = torch.zeros(batch, rows, rank, dtype=dtype, device=device)
    moments = Moments(zeros, zeros.clone(), torch.zeros(batch, rank, dtype=dtype, device=device))
    start = basis.initial(batch, size, rank, seed, dtype=dtype, device=device)
    return LowRankState(moments, start, torch.zeros(batch, dtype=dtype, device=device))


def refresh(
    gradients: list[Tensor],
    state: LowRankState,
    due: list[int],
    basis: Basis,
    betas: tuple[float, float],
    *,
    first: bool,
) -> None:
    """Chooses the basis of the matrices `due` anew and carries their moments into it, in place."""
    index = torch.tensor(due, device=state.limiter_B.device)
    gradient_bMN = torch.stack([gradients[i] for i in due])
    part = state.part(index)
    old, new = part.basis, basis.refresh(gradient_bMN, part.basis, first=first)
    part.basis = new
    if not first:
        frame_bNR = basis.frame(new, gradient_bMN.shape[-1], gradient_bMN.dtype)
        part.moments = basis.carry(part.moments, pull(gradient_bMN, frame_bNR), old, new, betas)
    state.write_part(index, part)


def low_rank_step(
    weights: list[Tensor],
    gradients: list[Tensor],
    state: LowRankState,
    *,
    basis: Basis,
    residual: Fira | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Updates B weights [M N] and their state in place; `gradients` [M N] are in the state's dtype and stay as they
    are.
    """
    moments, size = state.moments, gradients[0].shape[-1]
    frame_BNR = basis.frame(state.basis, size, gradients[0].dtype)
    coordinates_BMR = torch.empty_like(moments.first_BMR)
    for gradient_MN, frame_NR, out_MR in zip(gradients, frame_BNR, coordinates_BMR, strict=True):
        torch.mm(gradient_MN, frame_NR, out=out_MR)
    moments.age_BR.add_(1)
    direction_BMR = low_rank_adam(coordinates_BMR, moments.first_BMR, moments.second_BMR, moments.age_BR, *betas, eps)
    scale_BM = None
    if residual is not None:
        energy_BM = torch.stack([torch.linalg.vector_norm(g, dim=-1) for g in gradients]).square_()
        scale_BM, norm_B = residual.scales(direction_BMR, coordinates_BMR, energy_BM, state.limiter_B)
        state.limiter_B.copy_(norm_B)
        direction_BMR.addcmul_(coordinates_BMR, scale_BM[:, :, None], value=-1)
    for i, (weight_MN, gradient_MN) in enumerate(zip(weights, gradients, strict=True)):
        scale_M1 = None if scale_BM is None else scale_BM[i, :, None]
        _apply(weight_MN, direction_BMR[i], frame_BNR[i], gradient_MN, scale_M1, lr, 1 - lr * weight_decay)


def _apply(
    weight_MN: Tensor,
    direction_MR: Tensor,
    frame_NR: Tensor,
    gradient_MN: Tensor,
    scale_M1: Tensor | None,
    lr: float,
    keep: float,
) -> None:
    """W <- keep W - lr (direction Q^T + scale o G), rounded once to the weight's dtype."""
    wide_MN = weight_MN if weight_MN.dtype == direction_MR.dtype else weight_MN.to(direction_MR.dtype)
    wide_MN.addmm_(direction_MR, frame_NR.mT, beta=keep, alpha=-lr)
    if scale_M1 is not None:
        wide_MN.addcmul_(gradient_MN, scale_M1, value=-lr)
    if wide_MN is not weight_MN:
        weight_MN.copy_(wide_MN)
