"""The weight update from coordinates: W <- keep W - lr (U Q^T + s o G), decay, step and residual in one pass over W.

The residual s o G is what Fira and APOLLO add to the low-rank step, with one scale per row. For Fira,
U Q^T + s o (G - R Q^T) = (U - s o R) Q^T + s o G, so a single back-projection does both parts. The sum is rounded to
the weight's dtype once: bfloat16 stochastically, since rounding to nearest would lose every step below 2^-9 of a
weight.

Shapes: B matrices, M rows, N columns, R rank (0: no back-projection). No backward: optimiser steps only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightspan.triton_kernels.launch import INTERPRETED, address_table, element_type, tl, triton
from lightspan.triton_kernels.project import dot_precision
from lightspan.triton_kernels.rounding import WINDOW, stochastic_round_

if triton is not None:
    from lightspan.triton_kernels.rounding import round_stochastically


def operand_type(weight: torch.dtype) -> torch.dtype:
    """The dtype in which U and Q are multiplied.

    bfloat16 weights use bfloat16 products: they err by 2^-9 of one step, the weight itself by up to 2^-8 of a weight.
    float16 does not, because it has no exponents for directions of any scale.
    """
    return torch.float32 if weight == torch.float16 else weight


def backproject_update_reference(
    weights: Sequence[Tensor], direction_BMR: Tensor, frame_BNR: Tensor, gradients: Sequence[Tensor],
    scale_BM: Tensor, lr: Tensor, keep: Tensor, seed: Tensor | None,
) -> None:  # fmt: skip
    """The definition, and the CPU path: by tiles of rows, so that intermediate results stay in the caches."""
    (M, N), R, dtype = weights[0].shape, frame_BNR.shape[2], weights[0].dtype
    wide, operand = torch.promote_types(dtype, torch.float32), operand_type(dtype)
    rate, kept = lr.item(), keep.item()
    number = None if seed is None or dtype != torch.bfloat16 else int(seed)
    lefts, rights = direction_BMR.to(operand), frame_BNR.to(operand)
    height, width = M, N
    if weights[0].stride(1) != 1:  # transposed views: their memory is rows of the transpose
        lefts, rights, height, width = rights, lefts, N, M
    tiles = -(-height // max(1, WINDOW // width))  # of each matrix
    rows = -(-height // tiles)
    scratch = torch.empty(0 if dtype == wide else rows, width, dtype=wide, device=weights[0].device)
    product = torch.empty(scratch.shape, dtype=operand, device=scratch.device)
    for b, weight in enumerate(weights):
        left, right = lefts[b], rights[b].mT
        residual = [gradients[b], scale_BM[b, :, None].expand(M, N)] if gradients else []
        if weight.stride(1) != 1:
            weight, residual = weight.mT, [factor.mT for factor in residual]
        if dtype == wide:
            if R:
                weight.addmm_(left, right, beta=kept, alpha=-rate)
            elif kept != 1:
                weight.mul_(kept)
            if residual:  # a transpose by itself is several times as fast as one on the way
                steps, scales = residual
                weight.addcmul_(steps.contiguous(), scales, value=-rate)
            continue
        for place, first in enumerate(range(0, height, rows), start=b * tiles):
            part = slice(first, min(first + rows, height))
            tile, total, step = weight[part], scratch[: part.stop - first], product[: part.stop - first]
            total.copy_(tile)
            if kept != 1:
                total.mul_(kept)
            if R:
                total.add_(torch.mm(left[part], right, out=step), alpha=-rate)
            if residual:
                total.addcmul_(*(factor[part] for factor in residual), value=-rate)
            if number is not None:
                stochastic_round_(total, number, tile=place * -(-width // WINDOW))
            tile.copy_(total)


def blocks(rank: int, operand_size: int) -> dict[str, int]:
    """Tile and launch sizes for operands of `operand_size` bytes: 128 bytes of the rank at a time."""
    depth = max(16, min(triton.next_power_of_2(rank), 128 // operand_size))
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_R": depth, "num_warps": 8}


if triton is not None:

    @triton.jit
    def backproject_update_kernel(
        weights_ptr, direction_ptr, frame_ptr, gradients_ptr, scale_ptr, lr_ptr, keep_ptr, seed_ptr,
        M, N, R, weight_stride_m, weight_stride_n, gradient_stride_m, gradient_stride_n,
        WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, BACKPROJECT: tl.constexpr, SEEDED: tl.constexpr,
        ALIGNED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        matrix = tl.program_id(2).to(tl.int64)
        inside = (m < M)[:, None] & (n < N)[None, :]
        step = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if BACKPROJECT:
            direction_ptr += (matrix * M + m[:, None]) * R
            frame_ptr += (matrix * N + n[None, :]) * R
            inner = tl.arange(0, BLOCK_R)
            for start in range(0, R, BLOCK_R):
                r = start + inner
                direction = tl.load(direction_ptr + r[None, :], mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)
                frame = tl.load(frame_ptr + r[:, None], mask=(r < R)[:, None] & (n < N)[None, :], other=0.0)
                if UPCAST:
                    direction, frame = direction.to(tl.float32), frame.to(tl.float32)
                step = tl.dot(direction, frame, step, input_precision=PRECISION)
        if GRADIENT is not None:
            g_ptr = tl.load(gradients_ptr + matrix).to(tl.pointer_type(GRADIENT))
            if ALIGNED:
                g_ptr = tl.multiple_of(g_ptr, 16)
            g = tl.load(g_ptr + m[:, None] * gradient_stride_m + n[None, :] * gradient_stride_n, mask=inside, other=0.0)
            scale = tl.load(scale_ptr + matrix * M + m, mask=m < M, other=0.0).to(tl.float32)
            step += scale[:, None] * g.to(tl.float32)
        w_ptr = tl.load(weights_ptr + matrix).to(tl.pointer_type(WEIGHT))
        if ALIGNED:
            w_ptr = tl.multiple_of(w_ptr, 16)
        w_ptr += m[:, None] * weight_stride_m + n[None, :] * weight_stride_n
        w = tl.load(w_ptr, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(keep_ptr).to(tl.float32) * w - tl.load(lr_ptr).to(tl.float32) * step
        if SEEDED:
            w = round_stochastically(w, tl.load(seed_ptr), (matrix * M + m[:, None]) * N + n[None, :])
        tl.store(w_ptr, w.to(WEIGHT), mask=inside)


def backproject_update_triton(
    weights: Sequence[Tensor], direction_BMR: Tensor, frame_BNR: Tensor, gradients: Sequence[Tensor],
    scale_BM: Tensor, lr: Tensor, keep: Tensor, seed: Tensor | None,
) -> None:  # fmt: skip
    """Launches the kernel, never autotuned: a tuning run would apply the step. float64 uses the reference."""
    (M, N), (B, _, R), dtype = weights[0].shape, frame_BNR.shape, weights[0].dtype
    if torch.float64 in (dtype, direction_BMR.dtype):
        return backproject_update_reference(weights, direction_BMR, frame_BNR, gradients, scale_BM, lr, keep, seed)
    # Both are read once per tile of W: if W is bfloat16, rounding them here halves that traffic.
    operand = operand_type(dtype)
    direction_BMR, frame_BNR = direction_BMR.to(operand).contiguous(), frame_BNR.to(operand).contiguous()
    sizes = blocks(R, operand.itemsize)
    grid = (triton.cdiv(N, sizes["BLOCK_N"]), triton.cdiv(M, sizes["BLOCK_M"]), B)
    seeded = dtype == torch.bfloat16 and seed is not None
    backproject_update_kernel[grid](
        address_table(list(weights)), direction_BMR, frame_BNR,
        address_table(list(gradients)) if gradients else None, scale_BM.contiguous() if gradients else None,
        lr, keep, seed if seeded else None,
        M, N, R, *weights[0].stride(), *(gradients[0].stride() if gradients else (0, 0)),
        WEIGHT=element_type(dtype), GRADIENT=element_type(gradients[0].dtype) if gradients else None,
        BACKPROJECT=R > 0, SEEDED=seeded, ALIGNED=all(t.data_ptr() % 16 == 0 for t in (*weights, *gradients)),
        UPCAST=INTERPRETED, PRECISION=dot_precision(), **sizes,
    )  # fmt: skip
    return None


@torch.library.custom_op("lightspan::backproject_update", mutates_args=("weights",))
def backproject_update(
    weights: Sequence[Tensor], direction_BMR: Tensor, frame_BNR: Tensor, gradients: Sequence[Tensor],
    scale_BM: Tensor, lr: Tensor, keep: Tensor, seed: Tensor | None,
) -> None:  # fmt: skip
    """W <- keep W - lr (U Q^T + s o G) in every weight, in place.

    Args:
        weights: B matrices [M N] of one dtype and layout; a transposed view is as good as a contiguous matrix.
        direction_BMR, frame_BNR: U and Q; with R = 0 there is no back-projection.
        gradients: G of every weight, in any dtype, or none for no residual; then `scale_BM` is an empty [0 M].
        scale_BM: s, one factor per row of G.
        lr, keep: 0-d. `keep` is 1 - lr times the weight decay.
        seed: 0-d int64. With it bfloat16 weights are rounded stochastically, else to nearest. Launches of one step
            need different seeds, or their roundings err alike. Other dtypes do not use it.
    """
    backproject_update_reference(weights, direction_BMR, frame_BNR, gradients, scale_BM, lr, keep, seed)


@backproject_update.register_fake
def _(
    weights: Sequence[Tensor], direction_BMR: Tensor, frame_BNR: Tensor, gradients: Sequence[Tensor],
    scale_BM: Tensor, lr: Tensor, keep: Tensor, seed: Tensor | None,
) -> None:  # fmt: skip
    return None


if triton is not None:
    backproject_update.register_kernel("cuda")(backproject_update_triton)


def update(
    weights: Sequence[Tensor], steps: Sequence[Tensor], lr: Tensor, keep: Tensor, seed: Tensor | None,
    factor: float = 1.0,
) -> None:  # fmt: skip
    """W <- keep W - lr f S in every weight, in place: `backproject_update` without coordinates.

    Args:
        steps: S [M N] of every weight.
        factor: f, the same for all.
        lr, keep, seed: as there.
    """
    (M, N), B = steps[0].shape, len(steps)
    none_BM0, none_BN0 = (steps[0].new_empty(B, size, 0) for size in (M, N))
    backproject_update(weights, none_BM0, none_BN0, steps, steps[0].new_full((B, M), factor), lr, keep, seed)
