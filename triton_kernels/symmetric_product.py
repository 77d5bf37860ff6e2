"""Symmetric products alpha X^T X + beta S of Newton-Schulz steps: Gram matrices, and polynomials b G + c G^2 of them.

What stands above the diagonal is what stands below, so programs compute the lower triangle of tiles alone and store
each tile twice, once transposed: half the multiplications of a general product, and a result that is symmetric to the
last bit. S is added where the sums still are in registers, which saves a pass over the result.

Shapes: B matrices, M rows, N columns.
"""

import torch
from torch import Tensor

from lightspan.core.devices import float32_precision
from lightspan.triton_kernels.launch import INTERPRETED, tl, triton


def symmetric_product_reference(x_BMN: Tensor, added_BNN: Tensor | None, alpha: float, beta: float) -> Tensor:
    """The definition, and the CPU path."""
    if added_BNN is None:
        product_BNN = x_BMN.mT @ x_BMN
        return product_BNN if alpha == 1 else product_BNN * alpha
    return torch.baddbmm(added_BNN, x_BMN.mT, x_BMN, beta=beta, alpha=alpha)


def blocks(columns: int, element_size: int) -> dict[str, int]:
    """Tile and launch sizes for operands of `element_size` bytes: 128 bytes of depth, half of it in AMD's 64 KiB."""
    block = min(max(16, triton.next_power_of_2(columns)), 128)
    return {"BLOCK_N": block, "BLOCK_M": 128 // element_size, "num_warps": 8 if block == 128 else 4}


if triton is not None:

    @triton.jit
    def symmetric_product_kernel(
        x_ptr, added_ptr, out_ptr, M, N, stride_b, stride_m, stride_n, added_b, added_m, added_n, alpha, beta,
        ADD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        row_tile, column_tile = tl.program_id(0), tl.program_id(1)
        matrix = tl.program_id(2).to(tl.int64)
        if column_tile <= row_tile:
            row = row_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            column = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            inner = tl.arange(0, BLOCK_M).to(tl.int64)
            x_ptr += matrix * stride_b
            accumulator = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
            for start in range(0, M, BLOCK_M):
                m = start + inner
                left = tl.load(
                    x_ptr + row[:, None] * stride_n + m[None, :] * stride_m,
                    mask=(row < N)[:, None] & (m < M)[None, :],
                    other=0.0,
                )
                right = tl.load(
                    x_ptr + m[:, None] * stride_m + column[None, :] * stride_n,
                    mask=(m < M)[:, None] & (column < N)[None, :],
                    other=0.0,
                )
                if UPCAST:
                    left, right = left.to(tl.float32), right.to(tl.float32)
                accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
            accumulator *= alpha
            inside = (row < N)[:, None] & (column < N)[None, :]
            lower = inside & (row[:, None] >= column[None, :])
            if ADD:
                added = tl.load(
                    added_ptr + matrix * added_b + row[:, None] * added_m + column[None, :] * added_n,
                    mask=lower,
                    other=0.0,
                )
                accumulator += beta * added.to(tl.float32)
            result = accumulator.to(out_ptr.dtype.element_ty)
            out_ptr += matrix * N * N
            tl.store(out_ptr + row[:, None] * N + column[None, :], result, mask=lower)
            mirrored = tl.trans(inside & (row[:, None] > column[None, :]))
            tl.store(out_ptr + column[:, None] * N + row[None, :], tl.trans(result), mask=mirrored)


def symmetric_product_triton(x_BMN: Tensor, added_BNN: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Launches the kernel. Products that must be exact in float32 or float64 leave tensor cores idle and are the
    reference's.
    """
    exact = x_BMN.dtype == torch.float32 and float32_precision() == "highest" and not INTERPRETED
    if exact or x_BMN.dtype == torch.float64:
        return symmetric_product_reference(x_BMN, added_BNN, alpha, beta)
    B, M, N = x_BMN.shape
    out_BNN = x_BMN.new_empty((B, N, N))
    sizes = blocks(N, x_BMN.element_size())
    tiles = triton.cdiv(N, sizes["BLOCK_N"])
    if out_BNN.numel():
        added = out_BNN if added_BNN is None else added_BNN
        symmetric_product_kernel[(tiles, tiles, B)](
            x_BMN, added, out_BNN, M, N, *x_BMN.stride(), *added.stride(), alpha, beta,
            ADD=added_BNN is not None, UPCAST=INTERPRETED, PRECISION="ieee" if INTERPRETED else "tf32", **sizes,
        )  # fmt: skip
    return out_BNN


@torch.library.custom_op("lightspan::symmetric_product", mutates_args=())
def symmetric_product(x_BMN: Tensor, added_BNN: Tensor | None, alpha: float, beta: float) -> Tensor:
    """alpha X^T X + beta S [B N N] in the dtype of X, rounded to it once.

    Args:
        x_BMN: any strides; of float dtype.
        added_BNN: S, symmetric, of the same dtype, of which the kernel reads the lower triangle; None for no S.
    """
    return symmetric_product_reference(x_BMN, added_BNN, alpha, beta)


@symmetric_product.register_fake
def _(x_BMN: Tensor, added_BNN: Tensor | None, alpha: float, beta: float) -> Tensor:
    B, _, N = x_BMN.shape
    return x_BMN.new_empty((B, N, N))


if triton is not None:
    symmetric_product.register_kernel("cuda")(symmetric_product_triton)
