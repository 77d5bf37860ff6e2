"""Coordinates of gradients in their frames, R = G Q, and the row energies |g_m|^2 in the same pass over G.

The energies measure the part outside the frame without forming it: for orthonormal Q the rows of G - R Q^T have energy
|g_m|^2 - |r_m|^2. G is the one large operand; a program keeps a tile of rows against as many columns of the frame as
fit into its registers, so that G is read once up to rank 256.

Shapes: B matrices, M rows, N columns, R rank. No backward: optimiser steps only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightspan.core.devices import float32_precision
from lightspan.triton_kernels.launch import INTERPRETED, address_table, element_type, tl, triton


def row_energies(gradient_MN: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared row norms, summed in `dtype`."""
    if gradient_MN.stride(1) == 1:
        return torch.linalg.vector_norm(gradient_MN, dim=1, dtype=dtype).square_()
    # With a stride the norm is not vectorised and takes 20 times as long; a sum of squares is vectorised.
    return torch.empty_like(gradient_MN, dtype=dtype).copy_(gradient_MN).square_().sum(dim=1)


def project_reference(gradients: Sequence[Tensor], frame_BNR: Tensor, energy: bool) -> tuple[Tensor, Tensor]:
    """The definition, and the CPU path. Products of bfloat16 are rounded to bfloat16 once, by torch.mm."""
    wide, narrow = torch.promote_types(frame_BNR.dtype, torch.float32), torch.bfloat16
    (B, _, R), M = frame_BNR.shape, gradients[0].shape[0]
    operand = narrow if gradients[0].dtype == narrow else wide
    frame_BNR = frame_BNR.to(operand)
    coordinates_BMR = frame_BNR.new_empty((B, M, R))
    energy_BM = frame_BNR.new_empty((B if energy else 0, M), dtype=wide)
    for b, gradient_MN in enumerate(gradients):
        torch.mm(gradient_MN.to(operand), frame_BNR[b], out=coordinates_BMR[b])
        if energy:
            energy_BM[b] = row_energies(gradient_MN, wide)
    return coordinates_BMR.to(wide), energy_BM


def blocks(rank: int, element_size: int) -> dict[str, int]:
    """Tile and launch sizes for operands of `element_size` bytes.

    64 rows, because with fewer the L2 cache traffic of the frame exceeds that of G. The depth is 128 bytes of a
    row, less at rank 256: AMD's 64 KiB of shared memory must fit the tiles twice.
    """
    block_rank = min(max(16, triton.next_power_of_2(rank)), 256)
    depth = min(128, 16_384 // block_rank) // element_size
    return {"BLOCK_M": 64, "BLOCK_N": depth, "BLOCK_R": block_rank, "num_warps": 4 if block_rank <= 64 else 8}


if triton is not None:

    @triton.jit
    def project_kernel(
        table_ptr, frame_ptr, coordinates_ptr, energy_ptr, M, N, R, stride_m, stride_n,
        ELEMENT: tl.constexpr, ENERGY: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        # Rank tiles vary fastest: programs that read the same rows of G run together and share them in the cache.
        rank_tile = tl.program_id(0)
        row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        matrix = tl.program_id(2).to(tl.int64)
        column = rank_tile.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        g_ptr = tl.load(table_ptr + matrix).to(tl.pointer_type(ELEMENT))
        if ALIGNED:
            g_ptr = tl.multiple_of(g_ptr, 16)
        frame_ptr += matrix * N * R
        inner = tl.arange(0, BLOCK_N).to(tl.int64)
        accumulator = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        squares = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, N, BLOCK_N):
            n = start + inner
            g = tl.load(
                g_ptr + row[:, None] * stride_m + n[None, :] * stride_n,
                mask=(row < M)[:, None] & (n < N)[None, :],
                other=0.0,
            )
            frame = tl.load(
                frame_ptr + n[:, None] * R + column[None, :], mask=(n < N)[:, None] & (column < R)[None, :], other=0.0
            ).to(ELEMENT)
            if ENERGY:
                wide = g.to(tl.float32)
                squares += wide * wide
            if UPCAST:
                g, frame = g.to(tl.float32), frame.to(tl.float32)
            accumulator = tl.dot(g, frame, accumulator, input_precision=PRECISION)
        tl.store(
            coordinates_ptr + (matrix * M + row[:, None]) * R + column[None, :],
            accumulator,
            mask=(row < M)[:, None] & (column < R)[None, :],
        )
        if ENERGY and rank_tile == 0:
            tl.store(energy_ptr + matrix * M + row, tl.sum(squares, axis=1), mask=row < M)


def dot_precision() -> str:
    """Precision of float32 products on tensor cores, as set by the caller for torch.matmul."""
    return "ieee" if float32_precision() == "highest" else "tf32"


def project_triton(gradients: Sequence[Tensor], frame_BNR: Tensor, energy: bool) -> tuple[Tensor, Tensor]:
    """Launches the kernel; float64 has none and uses the reference."""
    if torch.float64 in (frame_BNR.dtype, gradients[0].dtype):
        return project_reference(gradients, frame_BNR, energy)
    (B, N, R), (M, _), dtype = frame_BNR.shape, gradients[0].shape, gradients[0].dtype
    # Every row tile reads the frame: rounding it to half precision here halves that traffic. It is never widened here.
    frame_BNR = (frame_BNR if dtype == torch.float32 else frame_BNR.to(dtype)).contiguous()
    coordinates_BMR = frame_BNR.new_empty((B, M, R), dtype=torch.float32)
    energy_BM = frame_BNR.new_empty((B if energy else 0, M), dtype=torch.float32)
    sizes = blocks(R, dtype.itemsize)
    grid = (triton.cdiv(max(R, 1), sizes["BLOCK_R"]), triton.cdiv(M, sizes["BLOCK_M"]), B)
    project_kernel[grid](
        address_table(list(gradients)), frame_BNR, coordinates_BMR, energy_BM, M, N, R, *gradients[0].stride(),
        ELEMENT=element_type(dtype), ENERGY=energy, ALIGNED=all(g_MN.data_ptr() % 16 == 0 for g_MN in gradients),
        UPCAST=INTERPRETED, PRECISION=dot_precision(), **sizes,
    )  # fmt: skip
    return coordinates_BMR, energy_BM


@torch.library.custom_op("lightspan::project", mutates_args=())
def project(gradients: Sequence[Tensor], frame_BNR: Tensor, energy: bool) -> tuple[Tensor, Tensor]:
    """Coordinates G Q of every gradient, float32 (float64 for float64 frames), and squared row norms in that dtype.

    Args:
        gradients: B matrices [M N] of one dtype and layout; a transposed view is as good as a contiguous matrix.
        frame_BNR: one frame per matrix; any float dtype.
        energy: whether row norms are wanted; if not, they are returned as an empty [0 M].
    """
    return project_reference(gradients, frame_BNR, energy)


@project.register_fake
def _(gradients: Sequence[Tensor], frame_BNR: Tensor, energy: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(frame_BNR.dtype, torch.float32)
    (B, _, R), M = frame_BNR.shape, gradients[0].shape[0]
    return frame_BNR.new_empty((B, M, R), dtype=wide), frame_BNR.new_empty((B if energy else 0, M), dtype=wide)


if triton is not None:
    project.register_kernel("cuda")(project_triton)
