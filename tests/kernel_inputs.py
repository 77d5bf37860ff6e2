"""What tests of kernels share: the memory layouts that a matrix may come in, and what needs Triton."""

import pytest
from torch import Tensor

from lightspan.triton_kernels.launch import triton

needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
LAYOUTS = ["rows", "columns", "unaligned"]


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    """The same numbers by rows, as the transposed view of a wide matrix, or at an address that 16 does not divide."""
    if layout == "columns":
        return matrix.mT.contiguous().mT
    if layout == "unaligned":
        return matrix.new_zeros(1 + matrix.numel())[1:].view(matrix.shape).copy_(matrix)
    return matrix
