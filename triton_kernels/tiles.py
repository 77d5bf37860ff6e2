"""Shared by kernels that see a row of N = a * b numbers as a tile [a b] and multiply it from both sides.

Shapes: M rows, N = a * b columns, P rows at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightspan.core.devices import float32_precision
from lightspan.triton_kernels.launch import INTERPRETED, element_type, tl, triton

ROWS = 16  # of one program; more would leave a GPU idle at a few thousand rows
CACHED = 2**17  # numbers that a reference transforms at once on a CPU: 512 KiB of float32 fit into a core's cache


def row_tiles(gradient_MN: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Groups of rows in `dtype`, as many as fit into a CPU's caches; on a GPU as many as fit into 64 MiB of float32."""
    rows = max(1, (CACHED if gradient_MN.device.type == "cpu" else 2**24) // gradient_MN.shape[1])
    return (tile_PN.to(dtype) for tile_PN in gradient_MN.split(rows))


if triton is not None:

    @triton.jit
    def load_factor(factor_ptr, SIZE: tl.constexpr, PADDED: tl.constexpr, TRANSPOSED: tl.constexpr):
        """A or B, or its transpose, padded with zeros."""
        row, column = tl.arange(0, PADDED)[:, None], tl.arange(0, PADDED)[None, :]
        offset = column * SIZE + row if TRANSPOSED else row * SIZE + column
        return tl.load(factor_ptr + offset, mask=(row < SIZE) & (column < SIZE), other=0.0)

    @triton.jit
    def select_row(tile, k, GROUP: tl.constexpr):
        """Row k of a tile [A B GROUP], in float32. As a sum, because registers cannot be indexed."""
        member = tl.arange(0, GROUP)[None, None, :]
        return tl.sum(tl.where(member == k, tile.to(tl.float32), 0.0), axis=2)


def blocks(a: int, b: int, dtype: torch.dtype, transposed: bool, tiles: int = 1) -> dict[str, int]:
    """Tile and launch sizes for rows [a b] of `dtype`; `tiles` is how many tiles a kernel keeps besides that row.

    If rows are adjacent in memory (`transposed`: stride_m == 1), loading one alone would fetch 32 bytes for each of
    its numbers; so as many are loaded together as registers allow.
    """
    padded_a, padded_b = (max(16, triton.next_power_of_2(size)) for size in (a, b))
    area = padded_a * padded_b
    group = max(1, min(8, 32_768 // (area * dtype.itemsize)) // tiles) if transposed else 1
    return {
        "A": a, "B": b, "PADDED_A": padded_a, "PADDED_B": padded_b, "ROWS": ROWS, "GROUP": group,
        # Loading a row ahead costs registers, and AMD's compiler spills them sooner.
        "STAGES": 2 if area <= 4096 and not (transposed or torch.version.hip) else 1,
        "num_warps": 4 if area <= (1024 if transposed else 4096) else 8,
    }  # fmt: skip


def index_type(size: int, *strides: int) -> "tl.dtype":
    """Type of the offsets within a row. They stay in registers: 64 bits, where 32 suffice, make large tiles spill."""
    return tl.int32 if size * max(strides) < 2**31 else tl.int64


def operands(dtype: torch.dtype) -> dict[str, object]:
    """Types and precision of both products for gradients or weights of `dtype`.

    Between the products half types are bfloat16: float16 has no exponents for sums of scaled gradients. If float32
    must stay float32, three products of parts in TF32 do so on tensor cores; plain float32 products spill registers.
    """
    if INTERPRETED:
        return {"OPERAND": tl.float32, "MIDDLE": tl.float32, "PRECISION": "ieee"}
    if dtype != torch.float32:
        return {"OPERAND": element_type(dtype), "MIDDLE": tl.bfloat16, "PRECISION": "ieee"}
    exact = "ieee" if torch.version.hip else "tf32x3"
    precision = exact if float32_precision() == "highest" else "tf32"
    return {"OPERAND": tl.float32, "MIDDLE": tl.float32, "PRECISION": precision}
