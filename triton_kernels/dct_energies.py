"""Energies of all columns of G times the orthonormal DCT-II, by a fast transform that stays in registers.

A row x of N = a * b numbers is put in Makhoul's order, v = x_0, x_2, ... and then the odd positions backwards, so that
y_k = s_k Re(exp(-i pi k / 2N) FFT(v)_k) with s_0 = sqrt(1/N), s_k = sqrt(2/N) (Makhoul 1980). The FFT is done in two
steps over v as a matrix V [a b], and with k = k1 + a * k2 the last rotation splits into one factor for k1 and one for
k2, which are part of the tables, so that only real parts of the second step are needed:
    Y = Re((T o (F V)) S),   F = exp(-i pi 4 k1 n1 / 2a),   T = exp(-i pi k1 (4 n2 + 1) / 2N),
                             S = exp(-i pi k2 (4 n2 + 1) / 2b).
That is four real products of tiles, 4 (a + b) operations per number where the product with the basis takes 2 N.

Shapes: B matrices, M rows, N = a * b columns. No backward: optimiser steps only.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightspan.core.devices import float32_precision, wide_type, widest_float
from lightspan.core.errors import UserError
from lightspan.triton_kernels.launch import address_table, element_type, tl, triton
from lightspan.triton_kernels.tiles import ROWS, blocks, index_type, operands, row_tiles

if triton is not None:
    from lightspan.triton_kernels.tiles import load_factor, select_row


def rotation(size: int, like: Tensor) -> Tensor:
    """s_k exp(-i pi k / 2N) for the first half of k, from phases in float64 if the device has it."""
    if size < 1:
        raise UserError(f"DCT of length {size}: the last axis must have at least one number")
    index = torch.arange(size // 2 + 1, device=like.device).to(widest_float(like.device))
    phase = index * (torch.pi / (2 * size))
    scale = torch.full_like(phase, (2 / size) ** 0.5)
    scale[0] = size**-0.5
    return torch.polar(scale, -phase).to(like.dtype.to_complex())


def _half_spectrum(x: Tensor, turn: Tensor) -> Tensor:
    """Real and imaginary parts of z_k for the first half of k, [..., N // 2 + 1, 2]; `turn` is the `rotation`."""
    makhoul = torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), dim=-1)
    return torch.view_as_real(torch.fft.rfft(makhoul).mul_(turn))


def two_factors(size: int) -> tuple[int, int]:
    """The most balanced (a, b) with a <= b and a * b == size; (1, size) for a prime."""
    if size < 1:
        raise UserError(f"size {size}: a transform needs at least one number")
    left = next(a for a in range(int(size**0.5) + 1, 0, -1) if size % a == 0 and a * a <= size)
    return left, size // left


def _circle(phase: Tensor, quarter: int) -> Tensor:
    """Cosines and sines of phase * pi / (2 * quarter), in float64 after an integer reduction: [2 *phase.shape]."""
    angle = (phase % (4 * quarter)).double() * (torch.pi / (2 * quarter))
    return torch.stack((angle.cos(), angle.sin()))


@lru_cache(maxsize=16)
def tables(size: int, device: torch.device) -> list[Tensor]:
    """F [2 a a], T [2 a b] and S [2 b b] as cosines and sines in float32; S carries the scale sqrt(2/N)."""
    a, b = two_factors(size)
    k1, n2 = torch.arange(a), torch.arange(b)
    first, twiddle = _circle(4 * torch.outer(k1, k1), a), _circle(torch.outer(k1, 4 * n2 + 1), size)
    second = _circle(torch.outer(4 * n2 + 1, n2), b) * (2 / size) ** 0.5
    return [table.to(dtype=torch.float32, device=device) for table in (first, twiddle, second)]


def dct_energies_reference(gradients: Sequence[Tensor]) -> Tensor:
    """The definition, and the CPU path: by the FFT.

    On one EPYC core 2^20 numbers take 2 ms for N from 256 to 4096; the product with the basis takes 2.4 to 39 ms in
    float32 and 1.2 to 20 in bfloat16.
    """
    size, dtype = gradients[0].shape[1], wide_type(gradients[0].dtype)
    turn = rotation(size, gradients[0].new_empty(0, dtype=dtype))
    # Squares are summed over rows before they are put in order.
    by_part = [
        torch.stack([_half_spectrum(tile_PN, turn).square_().sum(dim=0) for tile_PN in row_tiles(g_MN, dtype)]).sum(
            dim=0
        )
        for g_MN in gradients
    ]
    parts = torch.stack(by_part)
    return torch.cat((parts[..., 0], parts[:, 1 : (size + 1) // 2, 1].flip(-1)), dim=-1)


if triton is not None:

    @triton.jit
    def dct_energies_kernel(
        table_ptr, first_ptr, twiddle_ptr, second_ptr, partial_ptr, M, stride_m, stride_n,
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
        first_cosine = load_factor(first_ptr, A, PADDED_A, False).to(OPERAND)
        first_sine = load_factor(first_ptr + A * A, A, PADDED_A, False).to(OPERAND)
        second_cosine = load_factor(second_ptr, B, PADDED_B, False).to(MIDDLE)
        second_sine = load_factor(second_ptr + B * B, B, PADDED_B, False).to(MIDDLE)
        i, j = tl.arange(0, PADDED_A)[:, None], tl.arange(0, PADDED_B)[None, :]
        inside, n = (i < A) & (j < B), i * B + j
        cosine = tl.load(twiddle_ptr + n, mask=inside, other=0.0)
        sine = tl.load(twiddle_ptr + A * B + n, mask=inside, other=0.0)
        column = tl.where(2 * n < A * B, 2 * n, 2 * A * B - 1 - 2 * n)
        g_ptr += column[:, :, None].to(INDEX) * stride_n
        energy = tl.zeros((PADDED_A, PADDED_B), dtype=tl.float32)
        start_row = tile * ROWS
        for start in tl.range(start_row, tl.minimum(start_row + ROWS, M), GROUP, num_stages=STAGES):
            row = start + tl.arange(0, GROUP)[None, None, :]
            g = tl.load(g_ptr + row * stride_m, mask=inside[:, :, None] & (row < M), other=0.0)
            for k in tl.range(GROUP, loop_unroll_factor=1):
                v = select_row(g, k, GROUP).to(OPERAND)
                real = tl.dot(first_cosine, v, input_precision=PRECISION)
                imaginary = tl.dot(first_sine, v, input_precision=PRECISION)  # of F V with the sign turned
                turned = (cosine * real - sine * imaginary).to(MIDDLE)
                y = tl.dot(turned, second_cosine, input_precision=PRECISION)
                turned = (cosine * -imaginary - sine * real).to(MIDDLE)
                y = tl.dot(turned, second_sine, y, input_precision=PRECISION)
                energy += y * y
        energy = tl.where((i == 0) & (j == 0), 0.5 * energy, energy)
        tl.store(partial_ptr + (matrix * tl.num_programs(0) + tile) * (A * B) + i + A * j, energy, mask=inside)


def tile(size: int, dtype: torch.dtype, transposed: bool) -> dict[str, int]:
    """Tile and launch sizes: those of a Kronecker basis, except that a tile of 64 rows always gets four warps.

    In chained products every warp has 16 rows, and additional warps repeat the work of others.
    """
    sizes = blocks(*two_factors(size), dtype, transposed, tiles=4)
    return sizes | {"num_warps": 4 if sizes["PADDED_A"] <= 64 and sizes["PADDED_B"] <= 64 else 8}


def fits(dtype: torch.dtype, size: int) -> bool:
    """Whether a row and the tables fit into the registers and the shared memory of one program."""
    exact = float32_precision() == "highest"
    limits = {torch.float32: 1024 if exact else 4096, torch.bfloat16: 8192, torch.float16: 8192}
    sizes = tile(size, dtype, False)
    return sizes["PADDED_B"] <= 128 and sizes["PADDED_A"] * sizes["PADDED_B"] <= limits.get(dtype, 0)


def dct_energies_triton(gradients: Sequence[Tensor]) -> Tensor:
    """Launches the kernel; no atomics, so the sum has a fixed order. Sizes that do not fit use the reference."""
    (M, N), dtype, device = gradients[0].shape, gradients[0].dtype, gradients[0].device
    if not fits(dtype, N):
        return dct_energies_reference(gradients)
    stride_m, stride_n = gradients[0].stride()
    tiles = triton.cdiv(M, ROWS)
    partial_BTN = torch.empty(len(gradients), tiles, N, dtype=torch.float32, device=device)
    dct_energies_kernel[(tiles, len(gradients))](
        address_table(list(gradients)), *tables(N, device), partial_BTN, M, stride_m, stride_n,
        ELEMENT=element_type(dtype), ALIGNED=all(gradient.data_ptr() % 16 == 0 for gradient in gradients),
        INDEX=index_type(N, stride_n), **operands(dtype), **tile(N, dtype, stride_m == 1),
    )  # fmt: skip
    return partial_BTN.sum(dim=1)


@torch.library.custom_op("lightspan::dct_energies", mutates_args=())
def dct_energies(gradients: Sequence[Tensor]) -> Tensor:
    """Squared column norms [B N] of every G times the DCT-II basis; float32, or float64 for float64 gradients.

    Args:
        gradients: B matrices [M N] of one dtype and layout; a transposed view is as good as a contiguous matrix.
    """
    return dct_energies_reference(gradients)


@dct_energies.register_fake
def _(gradients: Sequence[Tensor]) -> Tensor:
    wide = wide_type(gradients[0].dtype)
    return gradients[0].new_empty((len(gradients), gradients[0].shape[1]), dtype=wide)


if triton is not None:
    dct_energies.register_kernel("cuda")(dct_energies_triton)
