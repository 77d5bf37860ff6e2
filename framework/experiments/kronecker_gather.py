"""Coordinates in chosen columns of a fixed Kronecker basis, (G D)[:, columns] with D = A (x) B, and row energies of G.

A program transforms whole rows in registers (see kronecker_energies.py) and stores only the chosen numbers. It finds
them with a dense map from column to position, -1 if not chosen: a masked store, no search. The cost does not
depend on the rank, and the frame is R integers per matrix.

Shapes: B matrices, M rows, N = a * b columns, R rank; left_aa = A, right_bb = B. No backward: optimiser steps only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightspan.devices import wide_type
from lightspan.experiments.kronecker_energies import fits
from lightspan.triton_kernels.launch import address_table, element_type, tl, triton
from lightspan.triton_kernels.project import project_reference, project_triton
from lightspan.triton_kernels.tiles import ROWS, blocks, index_type, operands

if triton is not None:
    from lightspan.experiments.kronecker_energies import two_sided
    from lightspan.triton_kernels.tiles import load_factor, select_row


def kronecker_columns(columns_BR: Tensor, left_aa: Tensor, right_bb: Tensor) -> Tensor:
    """The frame [B N R] of the chosen columns of D."""
    left_BRa, right_BRb = left_aa.mT[columns_BR // len(right_bb)], right_bb.mT[columns_BR % len(right_bb)]
    return (left_BRa[..., :, None] * right_BRb[..., None, :]).flatten(-2).mT


def kronecker_gather_reference(
    gradients: Sequence[Tensor], columns_BR: Tensor, left_aa: Tensor, right_bb: Tensor, energy: bool
) -> tuple[Tensor, Tensor]:
    """The definition, and the CPU path: the projection onto those columns, written out."""
    return project_reference(gradients, kronecker_columns(columns_BR, left_aa, right_bb), energy)


def slot_map(columns_BR: Tensor, size: int) -> Tensor:
    """Position of every column in `columns`, -1 for the others: [B N] int32."""
    slot_BN = torch.full((len(columns_BR), size), -1, dtype=torch.int32, device=columns_BR.device)
    place_R = torch.arange(columns_BR.shape[1], dtype=torch.int32, device=columns_BR.device)
    return slot_BN.scatter_(1, columns_BR, place_R.expand_as(columns_BR))


if triton is not None:

    @triton.jit
    def kronecker_gather_kernel(
        table_ptr, slot_ptr, left_ptr, right_ptr, coordinates_ptr, energy_ptr, M, R, stride_m, stride_n,
        ELEMENT: tl.constexpr, OPERAND: tl.constexpr, MIDDLE: tl.constexpr, PRECISION: tl.constexpr,
        ENERGY: tl.constexpr, ALIGNED: tl.constexpr, INDEX: tl.constexpr,
        A: tl.constexpr, B: tl.constexpr, PADDED_A: tl.constexpr, PADDED_B: tl.constexpr,
        ROWS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """A program transforms ROWS rows, GROUP of them loaded at a time."""
        tile, matrix = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        g_ptr = tl.load(table_ptr + matrix).to(tl.pointer_type(ELEMENT))
        if ALIGNED:
            g_ptr = tl.multiple_of(g_ptr, 16)
        left = load_factor(left_ptr, A, PADDED_A, True).to(MIDDLE)
        right = load_factor(right_ptr, B, PADDED_B, False).to(OPERAND)
        i, j = tl.arange(0, PADDED_A)[:, None], tl.arange(0, PADDED_B)[None, :]
        inside, column = (i < A) & (j < B), i * B + j
        slot = tl.load(slot_ptr + matrix * (A * B) + column, mask=inside, other=-1)
        g_ptr += column[:, :, None].to(INDEX) * stride_n
        first = tile * ROWS
        for start in tl.range(first, tl.minimum(first + ROWS, M), GROUP, num_stages=STAGES):
            row = start + tl.arange(0, GROUP)[None, None, :]
            g = tl.load(g_ptr + row * stride_m, mask=inside[:, :, None] & (row < M), other=0.0)
            for k in tl.range(GROUP, loop_unroll_factor=1):
                x = select_row(g, k, GROUP)
                y = two_sided(left, x, right, PRECISION)
                row_k = tl.full((1, 1), start + k, dtype=tl.int64)
                place = matrix * M + row_k
                tl.store(coordinates_ptr + place * R + slot, y, mask=(slot >= 0) & (row_k < M))
                if ENERGY:
                    squares = tl.sum(tl.sum(x * x, axis=1, keep_dims=True), axis=0, keep_dims=True)
                    tl.store(energy_ptr + place, squares, mask=row_k < M)


def kronecker_gather_triton(
    gradients: Sequence[Tensor], columns_BR: Tensor, left_aa: Tensor, right_bb: Tensor, energy: bool
) -> tuple[Tensor, Tensor]:
    """Launches the kernel; factors that do not fit use the projection onto the columns, written out."""
    (M, N), (B, R), dtype = gradients[0].shape, columns_BR.shape, gradients[0].dtype
    if not fits(dtype, left_aa, right_bb):
        return project_triton(gradients, kronecker_columns(columns_BR, left_aa, right_bb), energy)
    stride_m, stride_n = gradients[0].stride()
    coordinates_BMR = torch.empty(B, M, R, dtype=torch.float32, device=columns_BR.device)
    energy_BM = torch.empty(B if energy else 0, M, dtype=torch.float32, device=columns_BR.device)
    kronecker_gather_kernel[(triton.cdiv(M, ROWS), B)](
        address_table(list(gradients)), slot_map(columns_BR, N),
        left_aa.float().contiguous(), right_bb.float().contiguous(), coordinates_BMR, energy_BM,
        M, R, stride_m, stride_n,
        ELEMENT=element_type(dtype), ENERGY=energy, INDEX=index_type(N, stride_n),
        ALIGNED=all(gradient.data_ptr() % 16 == 0 for gradient in gradients),
        **operands(dtype), **blocks(len(left_aa), len(right_bb), dtype, stride_m == 1),
    )  # fmt: skip
    return coordinates_BMR, energy_BM


@torch.library.custom_op("lightspan::kronecker_gather", mutates_args=())
def kronecker_gather(
    gradients: Sequence[Tensor], columns_BR: Tensor, left_aa: Tensor, right_bb: Tensor, energy: bool
) -> tuple[Tensor, Tensor]:
    """(G D)[:, columns] of every gradient, and squared row norms of G; float32, or float64 for float64 factors.

    Args:
        gradients: B matrices [M N] of one dtype and layout; a transposed view is as good as a contiguous matrix.
        columns_BR: int64, distinct within a matrix, in any order.
        left_aa, right_bb: A and B, with a * b = N.
        energy: whether row norms are wanted; if not, they are returned as an empty [0 M].
    """
    return kronecker_gather_reference(gradients, columns_BR, left_aa, right_bb, energy)


@kronecker_gather.register_fake
def _(
    gradients: Sequence[Tensor], columns_BR: Tensor, left_aa: Tensor, right_bb: Tensor, energy: bool
) -> tuple[Tensor, Tensor]:
    wide = wide_type(left_aa.dtype)
    (B, R), M = columns_BR.shape, gradients[0].shape[0]
    return left_aa.new_empty((B, M, R), dtype=wide), left_aa.new_empty((B if energy else 0, M), dtype=wide)


if triton is not None:
    kronecker_gather.register_kernel("cuda")(kronecker_gather_triton)
