"""A whole low-rank step in one kernel: R = G Q, U = Adam(R), W <- keep W - lr U Q^T.

A program keeps its rows' coordinates and direction in registers from the first product to the last. They never reach
memory, and B matrices of one shape need one launch where the three operations need three. A step that clips by the
global norm, or keeps a residual, needs the norms of all rows first; it uses project, low_rank_adam and
backproject_update one after the other.

Shapes: B matrices, M rows, N columns, R rank. No backward: optimiser steps only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightspan.triton_kernels.backproject_update import (
    backproject_update_reference,
    backproject_update_triton,
    operand_type,
)
from lightspan.triton_kernels.bias_correction import bias_correction
from lightspan.triton_kernels.launch import INTERPRETED, address_table, element_type, tl, triton
from lightspan.triton_kernels.low_rank_adam import low_rank_adam_reference, low_rank_adam_triton
from lightspan.triton_kernels.project import dot_precision, project_reference, project_triton

MAX_RANK = 256  # rows of more coordinates do not fit into the registers


def row_resident_step_reference(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], frame_BNR: Tensor, m_BMR: Tensor, v_BMR: Tensor,
    age_BR: Tensor, beta1: float, beta2: float, eps: float, lr: Tensor, keep: Tensor, seed: Tensor | None,
) -> None:  # fmt: skip
    """The definition, and the CPU path: the three operations, whose results are defined by their references."""
    coordinates_BMR, no_energy_BM = project_reference(gradients, frame_BNR, False)
    direction_BMR = low_rank_adam_reference(coordinates_BMR, m_BMR, v_BMR, age_BR, beta1, beta2, eps)
    backproject_update_reference(weights, direction_BMR, frame_BNR, [], no_energy_BM, lr, keep, seed)


if triton is not None:
    from lightspan.triton_kernels.rounding import round_stochastically

    @triton.jit
    def row_resident_step_kernel(
        weight_table_ptr, gradient_table_ptr, frame_ptr, m_ptr, v_ptr, correction1_ptr, correction2_ptr,
        lr_ptr, keep_ptr, seed_ptr, weight1, weight2, eps, M, N, R,
        weight_stride_m, weight_stride_n, gradient_stride_m, gradient_stride_n,
        WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, WEIGHTS_ALIGNED: tl.constexpr, GRADIENTS_ALIGNED: tl.constexpr,
        STEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        matrix = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        rank = tl.arange(0, BLOCK_R)
        inner = tl.arange(0, BLOCK_N).to(tl.int64)
        weight_ptr = tl.load(weight_table_ptr + matrix).to(tl.pointer_type(WEIGHT))
        gradient_ptr = tl.load(gradient_table_ptr + matrix).to(tl.pointer_type(GRADIENT))
        if WEIGHTS_ALIGNED:
            weight_ptr = tl.multiple_of(weight_ptr, 16)
        if GRADIENTS_ALIGNED:
            gradient_ptr = tl.multiple_of(gradient_ptr, 16)
        frame_ptr += matrix * N * R
        # Masks are on the sides that are stored or summed over; elsewhere what is read in excess is never used.
        g = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for start in range(0, N, BLOCK_N):
            n = start + inner
            gradient = tl.load(
                gradient_ptr + row[:, None] * gradient_stride_m + n[None, :] * gradient_stride_n,
                mask=(row < M)[:, None] & (n < N)[None, :],
                other=0.0,
            )
            frame = tl.load(
                frame_ptr + n[:, None] * R + rank[None, :], mask=(n < N)[:, None] & (rank < R)[None, :], other=0.0
            ).to(GRADIENT)
            if UPCAST:
                gradient, frame = gradient.to(tl.float32), frame.to(tl.float32)
            g = tl.dot(gradient, frame, g, input_precision=PRECISION)

        offset = (matrix * M + row[:, None]) * R + rank[None, :]
        held = (row < M)[:, None] & (rank < R)[None, :]
        m = tl.load(m_ptr + offset, mask=held, other=0.0)
        m += weight1 * (g - m)
        tl.store(m_ptr + offset, m, mask=held)
        v = tl.load(v_ptr + offset, mask=held, other=0.0)
        v += weight2 * (g * g - v)
        tl.store(v_ptr + offset, v, mask=held)
        correction1 = tl.load(correction1_ptr + matrix * R + rank, mask=rank < R, other=1.0)[None, :]
        correction2 = tl.load(correction2_ptr + matrix * R + rank, mask=rank < R, other=1.0)[None, :]
        # Outside the mask both moments are zero, and with eps = 0 their quotient would poison the product.
        u = tl.where(held, (m / correction1) / (tl.sqrt(v / correction2) + eps), 0.0).to(STEP)
        if UPCAST:
            u = u.to(tl.float32)

        lr, keep = tl.load(lr_ptr).to(tl.float32), tl.load(keep_ptr).to(tl.float32)
        for start in range(0, N, BLOCK_N):
            n = start + inner
            frame = tl.load(
                frame_ptr + n[:, None] * R + rank[None, :], mask=(n < N)[:, None] & (rank < R)[None, :], other=0.0
            ).to(STEP)
            if UPCAST:
                frame = frame.to(tl.float32)
            step = tl.dot(u, tl.trans(frame), input_precision=PRECISION)
            place = weight_ptr + row[:, None] * weight_stride_m + n[None, :] * weight_stride_n
            inside = (row < M)[:, None] & (n < N)[None, :]
            weight = keep * tl.load(place, mask=inside, other=0.0).to(tl.float32) - lr * step
            if seed_ptr is not None:
                weight = round_stochastically(weight, tl.load(seed_ptr), (matrix * M + row[:, None]) * N + n[None, :])
            tl.store(place, weight.to(WEIGHT), mask=inside)


def blocks(rank: int, element_size: int) -> dict[str, int]:
    """Tile and launch sizes; `element_size` in bytes of the wider of weights and gradients.

    64 rows, because the frame comes from the L2 cache twice per tile; above rank 128 only 32 fit into the registers.
    The depth is what compiles without spills for sm_80, sm_90 and gfx942, in full float32 too.
    """
    block_rank = max(16, triton.next_power_of_2(rank))
    return {
        "BLOCK_M": 64 if block_rank <= 128 else 32,
        "BLOCK_N": max(16, min(64, 4096 // block_rank)) if element_size == 2 else 16,
        "BLOCK_R": block_rank,
        "num_warps": 4 if block_rank <= 64 else 8,
    }


def row_resident_step_triton(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], frame_BNR: Tensor, m_BMR: Tensor, v_BMR: Tensor,
    age_BR: Tensor, beta1: float, beta2: float, eps: float, lr: Tensor, keep: Tensor, seed: Tensor | None,
) -> None:  # fmt: skip
    """Launches the kernel, or the three operations for float64 and for ranks above MAX_RANK; moments are contiguous."""
    (B, N, R), (M, _), wide = frame_BNR.shape, weights[0].shape, torch.float64
    weight, gradient = weights[0].dtype, gradients[0].dtype
    if wide in (weight, gradient, frame_BNR.dtype, m_BMR.dtype) or R > MAX_RANK:
        coordinates_BMR, no_energy_BM = project_triton(gradients, frame_BNR, False)
        direction_BMR = low_rank_adam_triton(coordinates_BMR, m_BMR, v_BMR, age_BR, beta1, beta2, eps)
        backproject_update_triton(weights, direction_BMR, frame_BNR, [], no_energy_BM, lr, keep, seed)
        return
    assert m_BMR.dtype == v_BMR.dtype == torch.float32
    assert m_BMR.is_contiguous()
    assert v_BMR.is_contiguous()
    if (
        weight == gradient == torch.bfloat16
    ):  # the frame is read by every tile of rows; half the bytes, the same products
        frame_BNR = frame_BNR.to(torch.bfloat16)
    sizes = blocks(R, max(weight.itemsize, gradient.itemsize))
    row_resident_step_kernel[(triton.cdiv(M, sizes["BLOCK_M"]), B)](
        address_table(list(weights)), address_table(list(gradients)), frame_BNR.contiguous(), m_BMR, v_BMR,
        *(bias_correction(age_BR.float(), beta).contiguous() for beta in (beta1, beta2)),
        lr, keep, seed if weight == torch.bfloat16 else None, 1 - beta1, 1 - beta2, eps, M, N, R,
        *weights[0].stride(), *gradients[0].stride(),
        WEIGHT=element_type(weight), GRADIENT=element_type(gradient),
        WEIGHTS_ALIGNED=all(matrix.data_ptr() % 16 == 0 for matrix in weights),
        GRADIENTS_ALIGNED=all(matrix.data_ptr() % 16 == 0 for matrix in gradients),
        STEP=element_type(operand_type(weight)), UPCAST=INTERPRETED, PRECISION=dot_precision(), **sizes,
    )  # fmt: skip


@torch.library.custom_op("lightspan::row_resident_step", mutates_args=("weights", "m_BMR", "v_BMR"))
def row_resident_step(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], frame_BNR: Tensor, m_BMR: Tensor, v_BMR: Tensor,
    age_BR: Tensor, beta1: float, beta2: float, eps: float, lr: Tensor, keep: Tensor, seed: Tensor | None,
) -> None:  # fmt: skip
    """One step of B weights and their moments, all in place, with neither clipping nor residual.

    Args:
        weights, gradients: B matrices [M N] each, of one dtype and layout each; any float dtypes.
        frame_BNR: one frame per matrix, any float dtype.
        m_BMR, v_BMR: float32 or float64. age_BR, beta1, beta2, eps: as in low_rank_adam.
        lr, keep: 0-d; keep is the share that weight decay leaves of a weight.
        seed: 0-d, int64, rounds bfloat16 weights stochastically; without it, to nearest.
    """
    row_resident_step_reference(weights, gradients, frame_BNR, m_BMR, v_BMR, age_BR, beta1, beta2, eps, lr, keep, seed)


@row_resident_step.register_fake
def _(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], frame_BNR: Tensor, m_BMR: Tensor, v_BMR: Tensor,
    age_BR: Tensor, beta1: float, beta2: float, eps: float, lr: Tensor, keep: Tensor, seed: Tensor | None,
) -> None:  # fmt: skip
    return None


if triton is not None:
    row_resident_step.register_kernel("cuda")(row_resident_step_triton)
