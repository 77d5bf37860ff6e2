"""Symmetric products: reference against float64, kernel against reference, layouts, symmetry, compiled code."""

import pytest
import torch
from ahead_of_time import Spec, compile_ahead
from kernel_inputs import LAYOUTS, needs_triton
from kernel_oracles import close
from torch import Tensor

from lightspan.triton_kernels.symmetric_product import (
    blocks,
    symmetric_product,
    symmetric_product_reference,
    symmetric_product_triton,
)

SHAPES = [(1, 1, 1), (2, 5, 3), (1, 1, 20), (2, 33, 130), (1, 70, 16)]  # B, M, N; 130 takes two tiles, 33 two depths
# A product is rounded to its dtype once, by at most 2^-9 in bfloat16; sums of float32 err by less than 1e-5 here.
# The interpreter cuts bfloat16 off instead, which is a unit of its last place, 2^-7.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def problem(shape: tuple[int, int, int], dtype: torch.dtype, layout: str = "rows") -> tuple[Tensor, Tensor]:
    B, M, N = shape
    generator = torch.Generator().manual_seed(0)
    x_BMN = (torch.randn(B, M, N, generator=generator) / M**0.5).to(dtype)
    if layout == "columns":
        x_BMN = x_BMN.mT.contiguous().mT
    elif layout == "unaligned":
        x_BMN = x_BMN.new_zeros(1 + x_BMN.numel())[1:].view(shape).copy_(x_BMN)
    added_BNN = torch.randn(B, N, N, generator=generator)
    return x_BMN, (added_BNN + added_BNN.mT).to(dtype)


def expected(x_BMN: Tensor, added_BNN: Tensor | None, alpha: float, beta: float) -> Tensor:
    product_BNN = alpha * x_BMN.double().mT @ x_BMN.double()
    return product_BNN if added_BNN is None else product_BNN + beta * added_BNN.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_reference_equals_the_product_in_float64(shape, dtype):
    x_BMN, added_BNN = problem(shape, dtype)
    for added, alpha, beta in ((None, 1.0, 0.0), (None, -0.5, 0.0), (added_BNN, 2.0, -4.8)):
        got = symmetric_product(x_BMN, added, alpha, beta)
        assert got.dtype == dtype
        # torch may round the product before it adds
        close(got, expected(x_BMN, added, alpha, beta), 2 * TOLERANCE[dtype])


@pytest.mark.sample(12)
@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_kernel_equals_the_product_in_float64_and_is_symmetric_bit_for_bit(shape, layout, dtype):
    x_BMN, added_BNN = problem(shape, dtype, layout)
    for added, alpha, beta in ((None, 1.0, 0.0), (added_BNN, 2.0, -4.8)):
        got_BNN = symmetric_product_triton(x_BMN, added, alpha, beta)
        close(got_BNN, expected(x_BMN, added, alpha, beta), TOLERANCE[dtype])
        assert torch.equal(got_BNN, got_BNN.mT)
        assert got_BNN.dtype == dtype


@needs_triton
def test_the_kernel_squares_what_it_adds():
    gram_BNN = symmetric_product_triton(problem((2, 40, 33), torch.float32)[0], None, 1.0, 0.0)
    close(
        symmetric_product_triton(gram_BNN, gram_BNN, 2.0315, -4.775),
        2.0315 * gram_BNN @ gram_BNN - 4.775 * gram_BNN,
        1e-5,
    )


@needs_triton
def test_the_kernel_reads_the_lower_triangle_of_what_is_added():
    x_BMN, added_BNN = problem((1, 8, 130), torch.float32)
    above = torch.ones(130, 130, dtype=torch.bool).triu(1)
    got = symmetric_product_triton(x_BMN, added_BNN.masked_fill(above, torch.nan), 1.0, 1.0)
    assert torch.equal(got, symmetric_product_triton(x_BMN, added_BNN, 1.0, 1.0))


@needs_triton
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_nothing_gives_zeros_or_nothing(shape):
    x_BMN = torch.ones(shape)
    got = symmetric_product_triton(x_BMN, None, 1.0, 0.0)
    assert torch.equal(got, torch.zeros(shape[0], shape[2], shape[2]))


@needs_triton
def test_zeros_give_zeros_and_a_row_that_is_not_finite_stays_in_its_matrix():
    x_BMN = torch.zeros(2, 3, 20, dtype=torch.bfloat16)
    assert not symmetric_product_triton(x_BMN, None, 1.0, 0.0).any()
    x_BMN[1, 0, 4] = torch.nan
    got_BNN = symmetric_product_triton(x_BMN, None, 1.0, 0.0)
    assert not got_BNN[0].any()
    assert got_BNN[1].isnan().any()


@needs_triton
def test_exact_products_of_float64_are_the_reference_s():
    x_BMN, added_BNN = problem((2, 9, 5), torch.float64)
    assert torch.equal(
        symmetric_product_triton(x_BMN, added_BNN, 2.0, 3.0), symmetric_product_reference(x_BMN, added_BNN, 2.0, 3.0)
    )


@pytest.mark.parametrize("added", [True, False])
def test_the_op_is_registered_soundly(added):
    x_BMN, added_BNN = problem((2, 6, 5), torch.float32)
    torch.library.opcheck(symmetric_product, (x_BMN, added_BNN if added else None, 2.0, 3.0))


def spec(columns: int, dtype: str, *, add: bool = False, transposed: bool = False) -> Spec:
    sizes = blocks(columns, 4 if dtype == "fp32" else 2)
    types = dict.fromkeys(("x_ptr", "added_ptr", "out_ptr"), f"*{dtype}")
    strides = ("stride_b", "stride_n" if transposed else "stride_m", "added_b", "added_m")
    types |= dict.fromkeys(("M", "N", *strides), "i32")
    aligned = list(types)
    flags = {"ADD": add, "UPCAST": False, "PRECISION": "tf32", "stride_m" if transposed else "stride_n": 1}
    return Spec(
        "symmetric_product:symmetric_product_kernel",
        types | {"alpha": "fp32", "beta": "fp32"},
        {"added_n": 1, **flags, **{name: size for name, size in sizes.items() if name.isupper()}},
        aligned=aligned,
        tensor_cores=True,
        options={"num_warps": sizes["num_warps"]},
    )


@needs_triton
@pytest.mark.aot
def test_the_kernel_compiles_for_gpus_without_spills(target):
    specs = [spec(columns, dtype, add=True) for columns in (64, 4096) for dtype in ("bf16", "fp32")]
    compile_ahead(target, *specs, spec(4096, "bf16"), spec(4096, "bf16", transposed=True))
