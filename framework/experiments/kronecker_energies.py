"""Energies of all columns of G D for a fixed Kronecker basis D = A (x) B, without forming G D.

Column j = i_a * b + i_b of D is A[:, i_a] (x) B[:, i_b], and a row x of G seen as a matrix X [a b] becomes A^T X B: two
small products that stay in registers, 2 (a + b) operations per number; the product with D takes 2 N. G is read once
and N numbers are written, all that choosing columns needs: dropping column j of G D costs energy_j of |G|^2.

Shapes: B matrices, M rows, N = a * b columns; left_aa = A, right_bb = B. No backward: optimiser steps only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightspan.devices import wide_type
from lightspan.triton_kernels.launch import address_table, element_type, tl, triton
from lightspan.triton_kernels.tiles import ROWS, blocks, index_type, operands, row_tiles

if triton is not None:
    from lightspan.triton_kernels.tiles import load_factor, select_row


def kronecker_energies_reference(gradients: Sequence[Tensor], left_aa: Tensor, right_bb: Tensor) -> Tensor:
    """The definition, and the CPU path: both products, written out.

    On one EPYC core 2^20 numbers take 1.2 to 3 ms for N from 256 to 4096; the product with the dense basis takes 2.4 to
    39 ms in float32 and 1.2 to 20 in bfloat16.
    """
    (a, b), wide = (len(left_aa), len(right_bb)), wide_type(left_aa.dtype)
    left_aa, right_bb = left_aa.to(wide), right_bb.to(wide)
    energy_BN = left_aa.new_zeros((len(gradients), a * b))
    for energy_N, gradient_MN in zip(energy_BN, gradients, strict=True):
        for tile_PN in row_tiles(gradient_MN, wide):
            half_Pab = (tile_PN.reshape(-1, b) @ right_bb).view(-1, a, b)
            energy_N += (left_aa.mT @ half_Pab).square_().sum(dim=0).flatten()
    return energy_BN


if triton is not None:

    @triton.jit
    def two_sided(left, x, right, PRECISION: tl.constexpr):
        """left x right in float32; the intermediate product is rounded to the type of `left`."""
        middle = tl.dot(x.to(right.dtype), right, input_precision=PRECISION)
        return tl.dot(left, middle.to(left.dtype), input_precision=PRECISION)

    @triton.jit
    def kronecker_energies_kernel(
        table_ptr, left_ptr, right_ptr, partial_ptr, M, stride_m, stride_n,
        ELEMENT: tl.constexpr, OPERAND: tl.constexpr, MIDDLE: tl.constexpr, PRECISION: tl.constexpr,
        ALIGNED: tl.constexpr, INDEX: tl.constexpr,
        A: tl.constexpr, B: tl.constexpr, PADDED_A: tl.constexpr, PADDED_B: tl.constexpr,
        ROWS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """A program sums squares over ROWS rows, GROUP of them loaded at a time, into its own row of `partial`."""
        tile, matrix = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        g_ptr = tl.load(table_ptr + matrix).to(tl.pointer_type(ELEMENT))
        if ALIGNED:
            g_ptr = tl.multiple_of(g_ptr, 16)
        left = load_factor(left_ptr, A, PADDED_A, True).to(MIDDLE)
        right = load_factor(right_ptr, B, PADDED_B, False).to(OPERAND)
        i, j = tl.arange(0, PADDED_A)[:, None], tl.arange(0, PADDED_B)[None, :]
        inside, column = (i < A) & (j < B), i * B + j
        g_ptr += column[:, :, None].to(INDEX) * stride_n
        energy = tl.zeros((PADDED_A, PADDED_B), dtype=tl.float32)
        first = tile * ROWS
        for start in tl.range(first, tl.minimum(first + ROWS, M), GROUP, num_stages=STAGES):
            row = start + tl.arange(0, GROUP)[None, None, :]
            g = tl.load(g_ptr + row * stride_m, mask=inside[:, :, None] & (row < M), other=0.0)
            for k in tl.range(GROUP, loop_unroll_factor=1):
                y = two_sided(left, select_row(g, k, GROUP), right, PRECISION)
                energy += y * y
        tl.store(partial_ptr + (matrix * tl.num_programs(0) + tile) * (A * B) + column, energy, mask=inside)


def fits(dtype: torch.dtype, left_aa: Tensor, right_bb: Tensor) -> bool:
    """Whether a row and both factors fit into the registers and the shared memory of one program."""
    limits = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}
    return left_aa.dtype != torch.float64 and max(len(left_aa), len(right_bb)) <= limits.get(dtype, 0)


def kronecker_energies_triton(gradients: Sequence[Tensor], left_aa: Tensor, right_bb: Tensor) -> Tensor:
    """Launches the kernel; no atomics, so the sum has a fixed order. Factors that do not fit use the reference."""
    (M, N), dtype = gradients[0].shape, gradients[0].dtype
    if not fits(dtype, left_aa, right_bb):
        return kronecker_energies_reference(gradients, left_aa, right_bb)
    stride_m, stride_n = gradients[0].stride()
    tiles = triton.cdiv(M, ROWS)
    partial_BTN = torch.empty(len(gradients), tiles, N, dtype=torch.float32, device=gradients[0].device)
    kronecker_energies_kernel[(tiles, len(gradients))](
        address_table(list(gradients)), left_aa.float().contiguous(), right_bb.float().contiguous(), partial_BTN,
        M, stride_m, stride_n,
        ELEMENT=element_type(dtype), ALIGNED=all(gradient.data_ptr() % 16 == 0 for gradient in gradients),
        INDEX=index_type(N, stride_n), **operands(dtype), **blocks(len(left_aa), len(right_bb), dtype, stride_m == 1),
    )  # fmt: skip
    return partial_BTN.sum(dim=1)


@torch.library.custom_op("lightspan::kronecker_energies", mutates_args=())
def kronecker_energies(gradients: Sequence[Tensor], left_aa: Tensor, right_bb: Tensor) -> Tensor:
    """Squared column norms [B N] of every G D with D = A (x) B; float32, or float64 for float64 factors.

    Args:
        gradients: B matrices [M N] of one dtype and layout; a transposed view is as good as a contiguous matrix.
        left_aa, right_bb: A and B, with a * b = N.
    """
    return kronecker_energies_reference(gradients, left_aa, right_bb)


@kronecker_energies.register_fake
def _(gradients: Sequence[Tensor], left_aa: Tensor, right_bb: Tensor) -> Tensor:
    wide = wide_type(left_aa.dtype)
    return gradients[0].new_empty((len(gradients), gradients[0].shape[1]), dtype=wide)


if triton is not None:
    kronecker_energies.register_kernel("cuda")(kronecker_energies_triton)
