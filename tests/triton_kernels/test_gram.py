"""Gram matrices: float64 products, exact symmetry, kernel against reference, compiled code."""

import pytest
import torch
from ahead_of_time import Spec, compile_ahead
from kernel_inputs import needs_triton

from lightspan.triton_kernels.gram import SPLIT, blocks, gram, gram_reference, gram_triton

SHAPES = [
    (1, 1, 1),
    (2, 5, 3),
    (3, SPLIT + 1, 17),
    (1, 70, 65),
    (2, 3, 130),
]  # B, N, R: up to two splits, three tiles


def normal(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_reference_is_the_product_in_float64(shape, dtype):
    y_BNR = normal(shape, dtype)
    got = gram(y_BNR)
    assert got.dtype == torch.float64
    torch.testing.assert_close(
        got, torch.einsum("bnr,bns->brs", y_BNR.double(), y_BNR.double()), rtol=1e-13, atol=1e-12
    )
    assert torch.equal(got, got.mT)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_equals_the_reference(shape, dtype):
    y_BNR = normal(shape, dtype)
    for y in (y_BNR, y_BNR.mT.contiguous().mT):
        got = gram_triton(y)
        # 256 products of about 1 summed in float32 err by less than 256 units of 2^-24.
        torch.testing.assert_close(got, gram_reference(y), rtol=1e-6, atol=2e-5)
        assert got.dtype == torch.float64
        assert torch.equal(got, got.mT)


@needs_triton
def test_the_error_does_not_grow_with_the_rows():
    y_BNR = normal((1, 40 * SPLIT, 1), torch.float32)
    torch.testing.assert_close(gram_triton(y_BNR), gram_reference(y_BNR), rtol=3e-7, atol=0)


def test_float64_goes_to_the_reference():
    y_BNR = normal((2, 5, 3), torch.float64)
    assert torch.equal(gram_triton(y_BNR), gram_reference(y_BNR))


def test_the_op_is_registered_soundly():
    torch.library.opcheck(gram, (normal((2, 5, 3), torch.float32),))


@needs_triton
@pytest.mark.aot
def test_the_kernel_compiles_for_gpus_without_spills(target):
    specs = []
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        for rank in (16, 256):
            sizes = blocks(rank, size)
            options = {"num_warps": sizes.pop("num_warps")}
            types = {"y_ptr": f"*{dtype}", "partial_ptr": "*fp32", "N": "i32", "R": "i32"}
            constants = {"UPCAST": False, "SPLIT": SPLIT, **sizes}
            specs.append(Spec("gram:gram_kernel", types, constants, list(types), dtype == "bf16", options))
    compile_ahead(target, *specs)
