"""Column energies under the DCT: scipy, the matrix, kernel against reference, accuracy, compiled code."""

import pytest
import scipy.fft
import torch
from ahead_of_time import Spec, compile_ahead
from kernel_inputs import LAYOUTS, laid_out, needs_triton
from kernel_oracles import NAMES, as_on_a_gpu, close_energies, column_energies, tiled_spec
from torch import Tensor

from lightspan.subspaces.frames import dct_matrix
from lightspan.triton_kernels import tiles
from lightspan.triton_kernels.dct_energies import (
    dct_energies,
    dct_energies_reference,
    dct_energies_triton,
    fits,
    tables,
    tile,
    two_factors,
)

PATHS = [dct_energies_reference, pytest.param(dct_energies_triton, marks=needs_triton)]

SHAPES = [(1, 1), (5, 2), (3, 7), (17, 12), (2, 13), (19, 60), (2, 256), (1, 660)]  # M, N
TOLERANCE = 1e-5


def problem(shape: tuple[int, int], dtype: torch.dtype, layout: str = "rows") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [laid_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), layout) for _ in range(2)]


def formula(gradients: list[Tensor]) -> Tensor:
    transformed = scipy.fft.dct(torch.stack(gradients).double().numpy(), norm="ortho")
    return torch.tensor(transformed).square().sum(dim=1)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 4096)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_equals_scipy_in_float64(shape, layout, dtype):
    gradients = problem(shape, dtype, layout)
    got = dct_energies(gradients)
    assert got.dtype == torch.float32
    close_energies(got, formula(gradients), TOLERANCE)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [1, 6, 7, 257])
def test_float64_is_computed_in_float64_and_equals_the_product_with_the_matrix(path, size):
    gradients = problem((4, size), torch.float64)
    basis = dct_matrix(size, dtype=torch.float64, device=torch.device("cpu"))
    got = path(gradients)
    assert got.dtype == torch.float64
    close_energies(got, column_energies(gradients, basis), 1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_a_cosine_has_all_its_energy_in_its_own_column(path):
    basis = dct_matrix(24, dtype=torch.float64, device=torch.device("cpu"))
    energy = path([3 * basis[:, 5:6].mT.float()])[0]
    expected = torch.zeros(24)
    expected[5] = 9.0
    torch.testing.assert_close(energy, expected, atol=1e-5, rtol=1e-6)


def test_groups_of_rows_in_the_reference_change_nothing(monkeypatch):
    gradients = problem((33, 12), torch.float32, "columns")
    whole = dct_energies_reference(gradients)
    monkeypatch.setattr(tiles, "CACHED", 60)
    close_energies(dct_energies_reference(gradients), whole, TOLERANCE)


@pytest.mark.sample(12)
@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_the_reference(shape, layout, dtype):
    gradients = problem(shape, dtype, layout)
    got = dct_energies_triton(gradients)
    assert got.dtype == torch.float32
    close_energies(got, dct_energies_reference(gradients), TOLERANCE)


@pytest.mark.parametrize("path", PATHS)
def test_float32_errs_by_a_hundred_thousandth_of_the_total(path):
    gradients = problem((4, 1024), torch.float32)
    truth = formula(gradients)
    assert ((path(gradients).double() - truth).abs().sum(dim=1) < 1e-5 * truth.sum(dim=1)).all()


@needs_triton
def test_the_kernel_reads_float16_and_sums_in_one_order():
    gradients = problem((19, 12), torch.float16)
    got = dct_energies_triton(gradients)
    close_energies(got, formula(gradients), TOLERANCE)
    assert torch.equal(got, dct_energies_triton(gradients))


@needs_triton
@pytest.mark.parametrize("size", [131, 2 * 131])
def test_sizes_that_do_not_fit_take_the_reference(size):
    gradients = problem((2, size), torch.bfloat16)
    assert not fits(torch.bfloat16, size)
    close_energies(dct_energies_triton(gradients), formula(gradients), TOLERANCE)


@needs_triton
def test_what_fits_keeps_within_the_shared_memory_of_every_gpu(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert fits(torch.bfloat16, 64 * 128)
    assert not fits(torch.bfloat16, 128 * 128)
    assert fits(torch.float32, 64 * 64)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert not fits(torch.float32, 64 * 64)


def test_tables_are_unit_circles():
    first, twiddle, second = tables(12, torch.device("cpu"))
    assert (first.shape, twiddle.shape, second.shape) == ((2, 3, 3), (2, 3, 4), (2, 4, 4))
    for table, length in ((first, 1.0), (twiddle, 1.0), (second, 2 / 12)):
        torch.testing.assert_close(table.square().sum(dim=0), torch.full(table.shape[1:], length))


def test_the_op_keeps_its_contract():
    torch.library.opcheck(dct_energies, (problem((5, 12), torch.bfloat16, "columns"),))
    torch.library.opcheck(dct_energies, (problem((5, 7), torch.float64),))


def spec(size: int, dtype: str, transposed: bool, target: str) -> Spec:
    element = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    types = {
        "table_ptr": "*i64",
        **dict.fromkeys(("first_ptr", "twiddle_ptr", "second_ptr", "partial_ptr"), "*fp32"),
        **dict.fromkeys(("M", "stride_m", "stride_n"), "i32"),
    }  # fmt: skip
    constants = {"ELEMENT": NAMES[dtype], "stride_m" if transposed else "stride_n": 1}
    kernel = "dct_energies:dct_energies_kernel"
    return tiled_spec(kernel, tile(size, element, transposed), types, dtype, target, **constants)


@needs_triton
@pytest.mark.aot
def test_the_kernel_compiles_for_gpus_without_spills(monkeypatch, target):
    as_on_a_gpu(monkeypatch)
    sizes = [(4096, "bf16", False), (4096, "bf16", True), (1024, "bf16", False)]
    assert all(fits(torch.bfloat16, size) for size, *_ in sizes)
    assert two_factors(4096) == (64, 64)
    if target == "sm_90":
        sizes += [(1024, "fp32", False)]
    compile_ahead(target, *(spec(*size, target) for size in sizes))
