"""Walsh-Hadamard transform along the last axis, orthonormal, in Sylvester's order.

H_1 = [1], H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2): entry (i, j) is (-1)^popcount(i & j) / sqrt(N). H is symmetric
and its own inverse, so the gradient of the transform is the transform of the gradient.
A long transform is done in passes (the Kronecker product of smaller Hadamard matrices): view the axis as
[outer, block, inner] and multiply the middle axis by H_block, with inner = 1 first and block times as long each pass.

Shapes: P rows, N length. Float64 is exact to rounding; half types are computed in float32 and rounded once.
"""

from functools import cache

import torch
from torch import Tensor

from lightspan.core.devices import wide_type
from lightspan.core.errors import UserError
from lightspan.triton_kernels.launch import INTERPRETED, element_type, tl, triton

# On one core of an EPYC, 2^16 numbers take 0.14 ms in blocks up to 32, 0.19 up to 128, 0.57 by log2(N) sums.
REFERENCE_BLOCK = 32
# Rows of one pass over all axes: 1 MiB of float32 stays in a core's cache; 64 rows of 2^16 go three times faster.
REFERENCE_TILE = 2**18
# Longer rows are transformed in pieces of this length, then across the pieces, a tile at a time: 2^20 numbers in 3.3
# instead of 9.3 ms, 2^24 in 92 instead of 206.
REFERENCE_ROW = 2**15
KERNEL_BLOCK = 64  # with 128 the three parts of a float32 tile spill registers on every GPU tried


def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal Hadamard matrix [N N] in Sylvester's order; symmetric.

    Raises:
        UserError: if size is not a power of two.
    """
    check_power_of_two(size)
    index = torch.arange(size, device=device)
    parity_NN = index[:, None] & index
    for shift in (32, 16, 8, 4, 2, 1):  # folds the bits of i & j onto the lowest: their sum modulo 2
        parity_NN = parity_NN ^ (parity_NN >> shift)
    return (1 - 2 * (parity_NN & 1)).to(dtype) * size**-0.5


def check_power_of_two(size: int) -> None:
    """Raises UserError unless a Hadamard matrix of Sylvester's kind exists."""
    if size < 1 or size & (size - 1):
        raise UserError(
            f"Hadamard transform of length {size}: the length must be a power of two; pad it to "
            f"{1 << max(size - 1, 0).bit_length()}"
        )


def blocks(size: int, limit: int) -> list[int]:
    """Powers of two up to `limit` whose product is `size`, as few as possible and as equal as possible."""
    bits = size.bit_length() - 1
    passes = max(1, -(-bits // (limit.bit_length() - 1)))
    return [1 << (bits + number) // passes for number in range(passes)]


@cache
def _small_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return hadamard_matrix(size, dtype, device)


def walsh_hadamard_reference(x: Tensor) -> Tensor:
    """The definition, and the CPU path: matrix products with small Hadamard matrices."""
    size, wide = x.shape[-1], wide_type(x.dtype)
    check_power_of_two(size)
    if size > REFERENCE_ROW:
        pieces = walsh_hadamard_reference(x.to(wide).reshape(-1, REFERENCE_ROW))
        return _across_pieces(pieces.view(-1, size)).to(x.dtype).view(x.shape)
    out_PN = torch.empty_like(x, memory_format=torch.contiguous_format).view(-1, size)
    rows = max(1, REFERENCE_TILE // size)
    for tile_PN, target_PN in zip(x.reshape(-1, size).split(rows), out_PN.split(rows), strict=True):
        part, inner = tile_PN.to(wide), 1
        for block in blocks(size, REFERENCE_BLOCK):
            factor = _small_matrix(block, wide, x.device)
            part = factor @ part.reshape(-1, block, inner) if inner > 1 else part.reshape(-1, block) @ factor
            inner *= block
        target_PN.copy_(part.view_as(target_PN))
    return out_PN.view(x.shape)


def _across_pieces(x_PN: Tensor) -> Tensor:
    """The passes over rows whose pieces of `REFERENCE_ROW` are already transformed, in place."""
    size, inner = x_PN.shape[-1], REFERENCE_ROW
    for block in blocks(size // REFERENCE_ROW, REFERENCE_BLOCK):
        factor = _small_matrix(block, x_PN.dtype, x_PN.device)
        for part in x_PN.view(-1, block, inner):
            for tile in part.split(REFERENCE_TILE // block, dim=1):
                tile.copy_(factor @ tile)
        inner *= block
    return x_PN


if triton is not None:

    @triton.jit
    def walsh_hadamard_kernel(
        x_ptr, out_ptr, fibres, scale,
        INNER: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr, FIBRES: tl.constexpr, OPERAND: tl.constexpr,
    ):  # fmt: skip
        """One pass: FIBRES vectors of BLOCK elements, INNER apart in memory, each times the signs of H_BLOCK."""
        fibre = tl.program_id(0).to(tl.int64) * FIBRES + tl.arange(0, FIBRES)
        row, column = tl.arange(0, PADDED)[:, None], tl.arange(0, PADDED)[None, :]
        offset = (fibre // INNER * (INNER * BLOCK) + fibre % INNER)[:, None] + column * INNER
        inside = (fibre < fibres)[:, None] & (column < BLOCK)
        x = tl.load(x_ptr + offset, mask=inside, other=0.0)
        parity = row & column
        parity ^= parity >> 4
        parity ^= parity >> 2
        parity ^= parity >> 1
        # Signs are exact in every type: half inputs are multiplied with them on tensor cores without loss, and so is
        # float32 as a sum of three bfloat16 of 8 bits each. Rows beyond BLOCK meet the zeros of the masked load.
        sign = (1 - 2 * (parity & 1)).to(OPERAND)
        if x.dtype == tl.float32:
            high = x.to(tl.bfloat16)
            rest = x - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            y = tl.dot(low.to(OPERAND), sign, input_precision="ieee")
            y = tl.dot(middle.to(OPERAND), sign, y, input_precision="ieee")
            y = tl.dot(high.to(OPERAND), sign, y, input_precision="ieee")
        else:
            y = tl.dot(x.to(OPERAND), sign, input_precision="ieee")
        tl.store(out_ptr + offset, (y * scale).to(out_ptr.dtype.element_ty), mask=inside)


def operand(dtype: torch.dtype) -> "tl.dtype":
    """What `tl.dot` multiplies: parts of float32 in bfloat16, half types unchanged; all in float32 when interpreted."""
    return tl.float32 if INTERPRETED else tl.bfloat16 if dtype == torch.float32 else element_type(dtype)


def tile(block: int) -> dict[str, int]:
    """Tile of one pass: block length padded to what `tl.dot` accepts, and vectors of a program."""
    return {"PADDED": max(16, block), "FIBRES": 64}


def walsh_hadamard_triton(x: Tensor) -> Tensor:
    """Launches one kernel per pass; between passes the numbers are float32 and unscaled."""
    size = x.shape[-1]
    check_power_of_two(size)
    out, inner, passes = x.contiguous(), 1, blocks(size, KERNEL_BLOCK)
    if not x.numel():
        return torch.empty_like(out)
    for number, block in enumerate(passes, start=1):
        source, last = out, number == len(passes)
        # Never in place: a program's first warp may store before its last has loaded.
        out = torch.empty_like(source, dtype=x.dtype if last else torch.float32)
        fibres, sizes = x.numel() // block, tile(block)
        constants = {"INNER": inner, "BLOCK": block, "OPERAND": operand(source.dtype), **sizes}
        grid = (triton.cdiv(fibres, sizes["FIBRES"]),)
        walsh_hadamard_kernel[grid](source, out, fibres, size**-0.5 if last else 1.0, **constants)
        inner *= block
    return out


@torch.library.custom_op("lightspan::walsh_hadamard", mutates_args=())
def walsh_hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform along the last axis, in the dtype of `x`; its own inverse and adjoint.

    Args:
        x: any float type and strides; the last axis is a power of two, at most 2^30 on a GPU.

    Raises:
        UserError: if the last axis is not a power of two.
    """
    return walsh_hadamard_reference(x)


@walsh_hadamard.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
    return walsh_hadamard(gradient)


walsh_hadamard.register_autograd(_backward)


if triton is not None:

    @walsh_hadamard.register_kernel("cuda")
    def _(x: Tensor) -> Tensor:
        return walsh_hadamard_reference(x) if x.dtype == torch.float64 else walsh_hadamard_triton(x)
