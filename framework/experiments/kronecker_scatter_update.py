"""The weight update from coordinates in a fixed Kronecker basis: W <- keep W - lr (U Q^T + s o G), Q = D[:, columns].

It is backproject_update with the frame given by R integers. A program spreads a row of U over the N columns through the
dense map of kronecker_gather.py, with zeros for the others, and transforms it back in registers: a row x of U Q^T seen
as a matrix [a b] is A Y B^T.

Shapes: B matrices, M rows, N = a * b columns, R rank; left_aa = A, right_bb = B. No backward: optimiser steps only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightspan.experiments.kronecker_energies import fits
from lightspan.experiments.kronecker_gather import kronecker_columns, slot_map
from lightspan.triton_kernels.backproject_update import backproject_update_reference, backproject_update_triton
from lightspan.triton_kernels.launch import address_table, element_type, tl, triton
from lightspan.triton_kernels.tiles import ROWS, blocks, index_type, operands

if triton is not None:
    from lightspan.experiments.kronecker_energies import two_sided
    from lightspan.triton_kernels.rounding import round_stochastically
    from lightspan.triton_kernels.tiles import load_factor


def kronecker_scatter_update_reference(
    weights: Sequence[Tensor], direction_BMR: Tensor, columns_BR: Tensor, left_aa: Tensor, right_bb: Tensor,
    gradients: Sequence[Tensor], scale_BM: Tensor, lr: Tensor, keep: Tensor, seed: Tensor | None,
) -> None:  # fmt: skip
    """The definition, and the CPU path: the back-projection from those columns, written out."""
    frame_BNR = kronecker_columns(columns_BR, left_aa, right_bb)
    backproject_update_reference(weights, direction_BMR, frame_BNR, gradients, scale_BM, lr, keep, seed)


if triton is not None:

    @triton.jit
    def kronecker_scatter_update_kernel(
        weights_ptr, direction_ptr, slot_ptr, left_ptr, right_ptr, gradients_ptr, scale_ptr, lr_ptr, keep_ptr, seed_ptr,
        M, R, weight_stride_m, weight_stride_n, gradient_stride_m, gradient_stride_n,
        WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, OPERAND: tl.constexpr, MIDDLE: tl.constexpr,
        PRECISION: tl.constexpr, SEEDED: tl.constexpr, ALIGNED: tl.constexpr, INDEX: tl.constexpr,
        A: tl.constexpr, B: tl.constexpr, PADDED_A: tl.constexpr, PADDED_B: tl.constexpr,
        ROWS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """A program updates ROWS rows, GROUP of them stored at a time."""
        tile, matrix = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        w_ptr = tl.load(weights_ptr + matrix).to(tl.pointer_type(WEIGHT))
        if ALIGNED:
            w_ptr = tl.multiple_of(w_ptr, 16)
        left = load_factor(left_ptr, A, PADDED_A, False).to(MIDDLE)
        right = load_factor(right_ptr, B, PADDED_B, True).to(OPERAND)
        lr, keep = tl.load(lr_ptr).to(tl.float32), tl.load(keep_ptr).to(tl.float32)
        i, j = tl.arange(0, PADDED_A)[:, None], tl.arange(0, PADDED_B)[None, :]
        inside, column = (i < A) & (j < B), i * B + j
        slot = tl.load(slot_ptr + matrix * (A * B) + column, mask=inside, other=-1)
        offset, member = column[:, :, None].to(INDEX), tl.arange(0, GROUP)[None, None, :]
        first = tile * ROWS
        for start in tl.range(first, tl.minimum(first + ROWS, M), GROUP, num_stages=STAGES):
            row = start + member
            step = tl.zeros((PADDED_A, PADDED_B, GROUP), dtype=tl.float32)
            for k in tl.range(GROUP, loop_unroll_factor=1):
                row_k = tl.full((1, 1), start + k, dtype=tl.int64)
                place = (matrix * M + row_k) * R + slot
                u = tl.load(direction_ptr + place, mask=(slot >= 0) & (row_k < M), other=0.0)
                step = tl.where(member == k, two_sided(left, u, right, PRECISION)[:, :, None], step)
            valid = inside[:, :, None] & (row < M)
            if GRADIENT is not None:
                g_ptr = tl.load(gradients_ptr + matrix).to(tl.pointer_type(GRADIENT))
                if ALIGNED:
                    g_ptr = tl.multiple_of(g_ptr, 16)
                g_ptr += offset * gradient_stride_n + row * gradient_stride_m
                g = tl.load(g_ptr, mask=valid, other=0.0).to(tl.float32)
                step += g * tl.load(scale_ptr + matrix * M + row, mask=row < M, other=0.0).to(tl.float32)
            target = w_ptr + offset * weight_stride_n + row * weight_stride_m
            w = keep * tl.load(target, mask=valid, other=0.0).to(tl.float32) - lr * step
            if SEEDED:
                w = round_stochastically(w, tl.load(seed_ptr), (matrix * M + row) * (A * B) + offset)
            tl.store(target, w.to(WEIGHT), mask=valid)


def kronecker_scatter_update_triton(
    weights: Sequence[Tensor], direction_BMR: Tensor, columns_BR: Tensor, left_aa: Tensor, right_bb: Tensor,
    gradients: Sequence[Tensor], scale_BM: Tensor, lr: Tensor, keep: Tensor, seed: Tensor | None,
) -> None:  # fmt: skip
    """Launches the kernel, never autotuned: a tuning run would apply the step. Factors that do not fit use the
    back-projection from the columns, written out.
    """
    (M, N), (B, R), dtype = weights[0].shape, columns_BR.shape, weights[0].dtype
    if direction_BMR.dtype == torch.float64 or not fits(dtype, left_aa, right_bb):
        frame_BNR = kronecker_columns(columns_BR, left_aa, right_bb)
        return backproject_update_triton(weights, direction_BMR, frame_BNR, gradients, scale_BM, lr, keep, seed)
    seeded = dtype == torch.bfloat16 and seed is not None
    kronecker_scatter_update_kernel[(triton.cdiv(M, ROWS), B)](
        address_table(list(weights)), direction_BMR.contiguous(), slot_map(columns_BR, N),
        left_aa.float().contiguous(), right_bb.float().contiguous(),
        address_table(list(gradients)) if gradients else None, scale_BM.contiguous() if gradients else None,
        lr, keep, seed if seeded else None,
        M, R, *weights[0].stride(), *(gradients[0].stride() if gradients else (0, 0)),
        WEIGHT=element_type(dtype), GRADIENT=element_type(gradients[0].dtype) if gradients else None, SEEDED=seeded,
        ALIGNED=all(t.data_ptr() % 16 == 0 for t in (*weights, *gradients)),
        INDEX=index_type(N, *(matrix.stride(1) for matrix in (*weights, *gradients))),
        **operands(dtype), **blocks(len(left_aa), len(right_bb), dtype, weights[0].stride(0) == 1, tiles=2),
    )  # fmt: skip
    return None


@torch.library.custom_op("lightspan::kronecker_scatter_update", mutates_args=("weights",))
def kronecker_scatter_update(
    weights: Sequence[Tensor], direction_BMR: Tensor, columns_BR: Tensor, left_aa: Tensor, right_bb: Tensor,
    gradients: Sequence[Tensor], scale_BM: Tensor, lr: Tensor, keep: Tensor, seed: Tensor | None,
) -> None:  # fmt: skip
    """W <- keep W - lr (U D[:, columns]^T + s o G) in every weight, in place, with D = A (x) B.

    Args:
        weights: B matrices [M N] of one dtype and layout; a transposed view is as good as a contiguous matrix.
        direction_BMR: U.
        columns_BR: int64, distinct within a matrix, in any order.
        left_aa, right_bb: A and B, with a * b = N.
        gradients: G of every weight, in any dtype, or none for no residual; then `scale_BM` is an empty [0 M].
        scale_BM: s, one factor per row of G.
        lr, keep: 0-d. `keep` is 1 - lr times the weight decay.
        seed: 0-d int64. With it bfloat16 weights are rounded stochastically, else to nearest. Launches of one step
            need different seeds, or their roundings err alike. Other dtypes do not use it.
    """
    kronecker_scatter_update_reference(
        weights, direction_BMR, columns_BR, left_aa, right_bb, gradients, scale_BM, lr, keep, seed
    )


@kronecker_scatter_update.register_fake
def _(
    weights: Sequence[Tensor], direction_BMR: Tensor, columns_BR: Tensor, left_aa: Tensor, right_bb: Tensor,
    gradients: Sequence[Tensor], scale_BM: Tensor, lr: Tensor, keep: Tensor, seed: Tensor | None,
) -> None:  # fmt: skip
    return None


if triton is not None:
    kronecker_scatter_update.register_kernel("cuda")(kronecker_scatter_update_triton)
