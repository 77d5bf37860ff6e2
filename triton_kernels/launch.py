"""What every launcher needs: Triton if it is installed, and lists of same-shape matrices as a table of addresses.

An optimiser's matrices are separate tensors; a launch per matrix would leave the GPU idle between small ones. A kernel
takes an int64 table of their addresses instead and finds its matrix by a program index:
`tl.load(table_ptr + matrix).to(tl.pointer_type(ELEMENT))`.
"""

import os
from functools import lru_cache

import torch
from torch import Tensor

from lightspan.core.errors import UserError

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installs have no Triton and use the references
    triton = tl = None

# The interpreter computes with bfloat16 bit patterns as if they were integers: kernels widen operands before `tl.dot`.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def address_table(matrices: list[Tensor]) -> Tensor:
    """Addresses [B] of B matrices of one shape, dtype and layout, on their device.

    Tables are cached: weights stay where they are, gradients return to the same addresses, and a captured CUDA graph
    keeps reading the table with which it was captured.
    """
    first = matrices[0]
    for matrix in matrices:
        if (matrix.shape, matrix.stride(), matrix.dtype) != (first.shape, first.stride(), first.dtype):
            raise UserError(
                f"matrices of one launch must agree in shape, strides and dtype: {tuple(matrix.shape)} "
                f"{matrix.stride()} {matrix.dtype} beside {tuple(first.shape)} {first.stride()} {first.dtype}"
            )
    table = _table(tuple(matrix.data_ptr() for matrix in matrices), first.device)
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.append(table)
    return table


_captured: list[Tensor] = []  # what graphs read must outlive the cache


@lru_cache(maxsize=4096)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(addresses, dtype=torch.int64).to(device)


def element_type(dtype: torch.dtype) -> "tl.dtype":
    """Triton's name of a torch dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))
