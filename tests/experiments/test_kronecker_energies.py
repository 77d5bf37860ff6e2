"""Column energies in a Kronecker basis: reference against float64, kernel against reference, layouts, compiled code."""

import pytest
import torch
from ahead_of_time import Spec, compile_ahead
from kernel_inputs import LAYOUTS, laid_out, needs_triton
from kernel_oracles import NAMES, as_on_a_gpu, close_energies, column_energies, tiled_spec
from torch import Tensor

from lightspan.experiments.kronecker_energies import (
    fits,
    kronecker_energies,
    kronecker_energies_reference,
    kronecker_energies_triton,
)
from lightspan.triton_kernels import tiles as shared
from lightspan.triton_kernels.launch import tl
from lightspan.triton_kernels.tiles import blocks, index_type

SHAPES = [(1, 1, 1), (5, 3, 4), (19, 1, 13), (17, 16, 16), (3, 20, 33)]  # M, a, b
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 2e-5  # squares of float32 sums over at most 660 numbers; half inputs are widened first


def problem(
    shape: tuple[int, int, int], dtype: torch.dtype, layout: str = "rows", wide: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Two gradients, and factors that are not symmetric, so that a transposed one shows."""
    (M, a, b), generator = shape, torch.Generator().manual_seed(0)
    gradients = [torch.randn(M, a * b, generator=generator, dtype=wide).to(dtype) for _ in range(2)]
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for n in (a, b))
    return [laid_out(gradient, layout) for gradient in gradients], left.to(wide), right.to(wide)


def formula(gradients: list[Tensor], left: Tensor, right: Tensor) -> Tensor:
    return column_energies(gradients, torch.kron(left.double(), right.double()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_equals_the_dense_product_in_float64(shape, layout, dtype):
    given = problem(shape, dtype, layout)
    got = kronecker_energies(*given)
    assert got.dtype == torch.float32
    close_energies(got, formula(*given), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_float64_factors_give_float64(dtype):
    given = problem((7, 3, 5), dtype, wide=torch.float64)
    for path in (kronecker_energies, kronecker_energies_triton):
        got = path(*given)
        assert got.dtype == torch.float64
        close_energies(got, formula(*given), 1e-13)


def test_an_orthonormal_basis_keeps_all_energy():
    gradients, left, right = problem((9, 4, 6), torch.float64, wide=torch.float64)
    kept = kronecker_energies(gradients, left, right).sum(dim=1)
    torch.testing.assert_close(kept, torch.stack(gradients).square().sum(dim=(1, 2)))


def test_groups_of_rows_in_the_reference_change_nothing(monkeypatch):
    given = problem((33, 3, 4), torch.float32, "columns")
    whole = kronecker_energies_reference(*given)
    monkeypatch.setattr(shared, "CACHED", 60)
    close_energies(kronecker_energies_reference(*given), whole, TOLERANCE)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_the_reference(shape, layout, dtype):
    given = problem(shape, dtype, layout)
    got = kronecker_energies_triton(*given)
    assert got.dtype == torch.float32
    close_energies(got, kronecker_energies_reference(*given), TOLERANCE)


@needs_triton
def test_the_kernel_reads_float16_and_sums_in_one_order():
    given = problem((19, 3, 4), torch.float16)
    got = kronecker_energies_triton(*given)
    close_energies(got, formula(*given), TOLERANCE)
    assert torch.equal(got, kronecker_energies_triton(*given))


@needs_triton
def test_factors_may_be_transposed_views_and_bfloat16():
    gradients, left, right = problem((4, 3, 20), torch.float32)
    left, right = left.bfloat16().mT, right.bfloat16().mT
    close_energies(kronecker_energies_triton(gradients, left, right), formula(gradients, left, right), TOLERANCE)
    close_energies(kronecker_energies_reference(gradients, left, right), formula(gradients, left, right), TOLERANCE)


@needs_triton
def test_factors_that_do_not_fit_take_the_reference():
    given = problem((2, 1, 131), torch.bfloat16)
    assert not fits(torch.bfloat16, *given[1:])
    close_energies(kronecker_energies_triton(*given), formula(*given), TOLERANCE)


def test_the_op_keeps_its_contract():
    torch.library.opcheck(kronecker_energies, problem((5, 3, 4), torch.bfloat16, "columns"))
    torch.library.opcheck(kronecker_energies, problem((5, 3, 4), torch.float64, wide=torch.float64))


@needs_triton
@pytest.mark.parametrize("size", [1, 16, 33, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_rows_of_a_program_are_whole_groups(size, dtype, tiles):
    for transposed in (False, True):
        sizes = blocks(size, size, dtype, transposed, tiles)
        assert sizes["ROWS"] % sizes["GROUP"] == 0
        assert size <= sizes["PADDED_A"] == sizes["PADDED_B"] >= 16


@needs_triton
def test_offsets_within_a_row_are_64_bits_where_32_would_overflow():
    assert index_type(4096, 1, 2**19 - 1) == tl.int32
    assert index_type(4096, 1, 2**19) == tl.int64


def spec(size: int, dtype: str, transposed: bool, target: str) -> Spec:
    element = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    types = {
        "table_ptr": "*i64", "left_ptr": "*fp32", "right_ptr": "*fp32", "partial_ptr": "*fp32",
        **dict.fromkeys(("M", "stride_m", "stride_n"), "i32"),
    }  # fmt: skip
    constants = {"ELEMENT": NAMES[dtype], "stride_m" if transposed else "stride_n": 1}
    kernel = "experiments.kronecker_energies:kronecker_energies_kernel"
    return tiled_spec(kernel, blocks(size, size, element, transposed), types, dtype, target, **constants)


@needs_triton
@pytest.mark.aot
def test_the_kernel_compiles_for_gpus_without_spills(monkeypatch, target):
    as_on_a_gpu(monkeypatch)
    sizes = [(64, "bf16", False), (64, "bf16", True), (32, "bf16", False)]  # 4096 and 1024 columns
    if target == "sm_90":
        sizes += [(64, "fp32", False)]
    compile_ahead(target, *(spec(*size, target) for size in sizes))
