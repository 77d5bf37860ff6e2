"""Orthonormal frames of one side of a matrix: how they are made, and the maps between weights and coordinates.

Shapes: B matrices of one shape, M rows (the kept side), N columns (the projected side), R rank.
A frame Q_BNR has orthonormal columns. push(z) = z Q^T lifts coordinates to weights, pull(G) = G Q is its adjoint; see
`lightspan.subspaces.maps`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightspan.core.devices import widest_float
from lightspan.triton_kernels.project import project


@dataclass(frozen=True)
class Frames:
    """The `SubspaceMap` of frames [B N R]: coordinates [B M R] to matrices [B M N]. Frames need not be orthonormal."""

    frame_BNR: Tensor

    def push(self, z_BMR: Tensor) -> Tensor:
        return z_BMR @ self.frame_BNR.mT

    def pull(self, g_BMN: Tensor) -> Tensor:
        return g_BMN @ self.frame_BNR


def gaussian(seeds: Sequence[int], size: int, rank: int) -> Tensor:
    """Standard normal matrices [B N R] in float64, one per seed: the same on every device, since the CPU draws them."""
    draws = [
        torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds
    ]
    return torch.stack(draws)


def random_frame(seeds: Sequence[int], size: int, rank: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random orthonormal frames [B N R], uniform over subspaces, one per seed."""
    return torch.linalg.qr(gaussian(seeds, size, rank)).Q.to(dtype=dtype, device=device)


def cholesky_qr2(y_BNR: Tensor, anchor_BNR: Tensor, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Orthonormal columns with the span of `y`, by CholeskyQR twice; what `y` does not determine is filled from
    `anchor`.

    Two passes bring the orthogonality error to rounding as long as cond(y)^2 fits the Gram's precision (Yamamoto et al.
    2015), so columns are scaled to unit length first and the r x r Gram is formed in float64. Gradients may be rank
    deficient or zero: a trace of the anchor (relative size `nudge`) makes dependent columns independent again, at a
    cost of nudge^2 in captured energy. A matrix whose Gram is still not positive definite, such as after a NaN, keeps
    its whole anchor. Neither case involves the host, so nothing synchronises. Devices without float64 leave it to the
    CPU.

    Args:
        anchor_BNR: orthonormal columns, such as the frame of the previous step.
        total: sums over ranks, if `y` and `anchor` are this rank's rows of taller ones; nothing else is sent.
    """
    device = y_BNR.device
    if widest_float(device) != torch.float64:
        return cholesky_qr2(y_BNR.cpu(), anchor_BNR.cpu(), total).to(device)
    norms, summed_gram = (_column_norms, gram) if total is None else _over_ranks(total)
    # Above the rounding of y, so that dependent columns differ from noise; its square above the rounding of the Gram.
    nudge = 1e-6 if y_BNR.dtype == torch.float64 else 1e-4
    tiny = torch.finfo(y_BNR.dtype).tiny
    q_BNR = (y_BNR / norms(y_BNR).clamp_min(tiny) + nudge * anchor_BNR).double()
    q_BNR = q_BNR / norms(q_BNR)
    identity_RR = torch.eye(y_BNR.shape[-1], device=device, dtype=torch.float64)
    sound_B11 = torch.ones(len(y_BNR), 1, 1, dtype=torch.bool, device=device)
    for _ in range(2):
        factor_BRR, info_B = torch.linalg.cholesky_ex(summed_gram(q_BNR))
        sound_B11 = (
            sound_B11 & (info_B == 0)[:, None, None] & factor_BRR.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        )
        factor_BRR = torch.where(sound_B11, factor_BRR, identity_RR)
        q_BNR = torch.linalg.solve_triangular(factor_BRR, q_BNR.mT, upper=False).mT
    return torch.where(sound_B11, q_BNR.to(y_BNR.dtype), anchor_BNR)


def gram(y_BNR: Tensor) -> Tensor:
    """Y^T Y of every matrix [B R R], in float64 and symmetric to the last bit: Cholesky loses positive definiteness by
    its rounding errors (Fukaya et al. 2014).
    """
    gram_BRR = y_BNR.new_empty((len(y_BNR), y_BNR.shape[2], y_BNR.shape[2]), dtype=torch.float64)
    for y_NR, gram_RR in zip(y_BNR, gram_BRR, strict=True):  # one at a time: the float64 copy is the largest tensor
        wide_NR = y_NR.double()
        torch.mm(wide_NR.mT, wide_NR, out=gram_RR)
    return gram_BRR.triu() + gram_BRR.triu(1).mT


def _column_norms(y_BNR: Tensor) -> Tensor:
    return y_BNR.norm(dim=1, keepdim=True)


def _over_ranks(total: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Column norms and Gram matrix of blocks whose rows are on several ranks."""
    return (lambda y_BNR: total(_column_norms(y_BNR).square()).sqrt(), lambda y_BNR: total(gram(y_BNR)))


def block_power_step(
    gradients: Sequence[Tensor],
    frame_BNR: Tensor,
    total: Callable[[Tensor], Tensor] | None = None,
    first_row: int = 0,
    mean_BMR: Tensor | None = None,
    share: float = 0.0,
) -> Tensor:
    """One step of subspace iteration towards the top right singular vectors of B gradients [M N]: orth(G^T orth(G Q)).

    The inner orthonormalisation halves the exponent of the condition number for the outer one: cond(G) instead
    of cond(G)^2. `frame` warm-starts it and replaces directions that the gradient does not have.

    Args:
        total: sums over ranks, if the gradients are this rank's rows of taller ones, from row `first_row` on. Norms, R
            x R and N x R numbers are sent.
        mean_BMR, share: with them the step is that of share * mean Q^T + (1 - share) G, which is never formed.
    """
    z_BMR, _ = project(gradients, frame_BNR, False)
    if mean_BMR is not None:
        z_BMR.lerp_(mean_BMR @ (frame_BNR.mT @ frame_BNR), share)
    (rows, rank), options = z_BMR.shape[1:], {"dtype": z_BMR.dtype, "device": z_BMR.device}
    identity_MR = torch.eye(first_row + rows, rank, **options)[first_row:]
    kept_BMR = cholesky_qr2(z_BMR, identity_MR.expand_as(z_BMR), total)
    y_BNR, _ = project([gradient.mT for gradient in gradients], kept_BMR, False)
    if mean_BMR is not None:
        y_BNR.lerp_(frame_BNR @ (mean_BMR.mT @ kept_BMR), share)
    return cholesky_qr2(y_BNR if total is None else total(y_BNR), anchor_BNR=frame_BNR)


def dct_matrix(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal DCT-II basis [N N]: column j is the cosine of frequency j, so x @ matrix = DCT-II(x) with norm
    'ortho'.

    Built in float64 with the phase reduced modulo 4N in integers: in float32, or without the reduction, the columns are
    not orthonormal by 2e-4 at N = 4096.
    """
    index = torch.arange(size, dtype=torch.int64)
    phase = torch.outer(2 * index + 1, index) % (4 * size)
    matrix = torch.cos(phase.double() * (torch.pi / (2 * size))) * (2 / size) ** 0.5
    matrix[:, 0] *= 0.5**0.5
    return matrix.to(dtype=dtype, device=device)


def top_columns(energy_BN: Tensor, rank: int) -> Tensor:
    """Indices [B R] of the largest energies, ascending: a sorted set keeps each column's moments in place when the set
    stays.
    """
    return energy_BN.topk(rank, dim=-1).indices.sort(dim=-1).values
