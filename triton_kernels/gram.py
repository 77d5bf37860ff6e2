"""Gram matrices Y^T Y in float64, from which CholeskyQR orthonormalises tall blocks (Fukaya et al. 2014).

Cholesky loses positive definiteness to rounding errors of the Gram matrix, so these must not grow with N: the kernel
sums 256 rows at a time in float32, where products of bfloat16 are exact, and the sums are added up in float64.

Shapes: B matrices, N rows, R rank (columns), S splits of the rows. No backward: optimiser steps only.
"""

import torch
from torch import Tensor

from lightspan.triton_kernels.launch import INTERPRETED, tl, triton

SPLIT = 256  # rows summed in float32


def mirrored(upper_BRR: Tensor) -> Tensor:
    """Symmetric to the last bit, of the upper triangle alone; what stands below may be anything."""
    return upper_BRR.triu() + upper_BRR.triu(1).mT


def gram_reference(y_BNR: Tensor) -> Tensor:
    """The definition, and the CPU path."""
    gram_BRR = y_BNR.new_empty((len(y_BNR), y_BNR.shape[2], y_BNR.shape[2]), dtype=torch.float64)
    for y_NR, gram_RR in zip(y_BNR, gram_BRR, strict=True):  # one at a time: the float64 copy is the largest tensor
        wide_NR = y_NR.double()
        torch.mm(wide_NR.mT, wide_NR, out=gram_RR)
    return mirrored(gram_BRR)


def blocks(rank: int, element_size: int) -> dict[str, int]:
    """Tile and launch sizes: square tiles of the result, 64 bytes' worth of rows at a time (128 spill on an A100)."""
    return {"BLOCK_R": min(64, max(16, triton.next_power_of_2(rank))), "BLOCK_N": 64 // element_size, "num_warps": 4}


if triton is not None:

    @triton.jit
    def gram_kernel(
        y_ptr, partial_ptr, N, R, UPCAST: tl.constexpr,
        SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        tiles = tl.cdiv(R, BLOCK_R)
        row_tile, column_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
        if column_tile < row_tile:
            return  # below the diagonal, where nobody reads
        split, matrix = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        row = row_tile.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        column = column_tile.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        y_ptr += matrix * N * R
        partial = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float32)
        for start in range(0, SPLIT, BLOCK_N):
            n = split * SPLIT + start + tl.arange(0, BLOCK_N)
            left = tl.load(y_ptr + n[None, :] * R + row[:, None], mask=(n < N)[None, :] & (row < R)[:, None], other=0.0)
            right = tl.load(
                y_ptr + n[:, None] * R + column[None, :], mask=(n < N)[:, None] & (column < R)[None, :], other=0.0
            )
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            partial = tl.dot(left, right, partial, input_precision="ieee")
        tl.store(
            partial_ptr + ((matrix * tl.num_programs(1) + split) * R + row[:, None]) * R + column[None, :],
            partial,
            mask=(row < R)[:, None] & (column < R)[None, :],
        )


def gram_triton(y_BNR: Tensor) -> Tensor:
    """Launches the kernel: float32 sums of every split, which torch adds up in float64. float64 takes the reference."""
    if y_BNR.dtype == torch.float64:
        return gram_reference(y_BNR)
    y_BNR = y_BNR.contiguous()
    B, N, R = y_BNR.shape
    sizes = blocks(R, y_BNR.element_size())
    partial_BSRR = y_BNR.new_empty((B, triton.cdiv(N, SPLIT), R, R), dtype=torch.float32)
    grid = (triton.cdiv(R, sizes["BLOCK_R"]) ** 2, partial_BSRR.shape[1], B)
    gram_kernel[grid](y_BNR, partial_BSRR, N, R, UPCAST=INTERPRETED, SPLIT=SPLIT, **sizes)
    return mirrored(partial_BSRR.sum(dim=1, dtype=torch.float64))


@torch.library.custom_op("lightspan::gram", mutates_args=())
def gram(y_BNR: Tensor) -> Tensor:
    """Y^T Y of every matrix, [B R R], float64 and exactly symmetric. Y may have any float dtype and any strides."""
    return gram_reference(y_BNR)


@gram.register_fake
def _(y_BNR: Tensor) -> Tensor:
    return y_BNR.new_empty((len(y_BNR), y_BNR.shape[2], y_BNR.shape[2]), dtype=torch.float64)


if triton is not None:
    gram.register_kernel("cuda")(gram_triton)
