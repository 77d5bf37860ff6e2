"""Coordinates in chosen columns of a Kronecker basis: reference, kernel, the map of columns, compiled code."""

import pytest
import torch
from ahead_of_time import Spec, compile_ahead
from kernel_inputs import LAYOUTS, laid_out, needs_triton
from kernel_oracles import NAMES, as_on_a_gpu, close, kronecker_frame, projection, tiled_spec
from torch import Tensor

from lightspan.experiments.kronecker_gather import (
    kronecker_columns,
    kronecker_gather,
    kronecker_gather_reference,
    kronecker_gather_triton,
    slot_map,
)
from lightspan.triton_kernels.tiles import blocks

SHAPES = [(1, 1, 1, 1), (5, 3, 4, 5), (19, 1, 13, 13), (17, 16, 16, 3), (3, 20, 33, 7)]  # M, a, b, R


def problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str = "rows", wide: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Two gradients, columns of their own for each in no order, and factors that are not symmetric."""
    (M, a, b, R), generator = shape, torch.Generator().manual_seed(0)
    gradients = [torch.randn(M, a * b, generator=generator, dtype=wide).to(dtype) for _ in range(2)]
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for n in (a, b))
    columns_BR = torch.stack([torch.randperm(a * b, generator=generator)[:R] for _ in range(2)])
    return [laid_out(gradient, layout) for gradient in gradients], columns_BR, left.to(wide), right.to(wide)


def formula(gradients: list[Tensor], columns_BR: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return projection(gradients, kronecker_frame(columns_BR, left, right))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_equals_the_dense_product_in_float64(shape, layout, dtype):
    given = problem(shape, dtype, layout)
    (got, energy), (expected, energies) = kronecker_gather(*given, True), formula(*given)
    assert got.dtype == energy.dtype == torch.float32
    # bfloat16 rounds the frame and the product, which is of the size of 1, by 2^-9 each.
    close(got, expected, 2**-6 if dtype == torch.bfloat16 else 1e-5)
    close(energy, energies, 1e-5)


def test_float64_factors_give_float64():
    given = problem((7, 3, 5, 4), torch.float64, wide=torch.float64)
    for path in (kronecker_gather, kronecker_gather_triton):
        for got, expected in zip(path(*given, True), formula(*given), strict=True):
            assert got.dtype == torch.float64
            close(got, expected, 1e-13)


def test_all_columns_of_an_orthonormal_basis_keep_all_energy():
    given = problem((9, 4, 6, 24), torch.float64, wide=torch.float64)
    coordinates_BMR, energy_BM = kronecker_gather(*given, True)
    close(coordinates_BMR.square().sum(dim=2), energy_BM, 1e-13)


def test_the_frame_holds_the_columns_of_the_kronecker_product():
    _, *given = problem((1, 3, 4, 5), torch.float64, wide=torch.float64)
    assert torch.equal(kronecker_columns(*given), kronecker_frame(*given))


def test_the_map_inverts_the_choice_of_columns():
    columns_BR = torch.tensor([[4, 0], [1, 2]])
    assert slot_map(columns_BR, 5).tolist() == [[1, -1, -1, -1, 0], [-1, 0, 1, -1, -1]]


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_the_formula(shape, layout, dtype):
    # Interpreted, every type is multiplied in float32, so that the formula is met closer than by the reference.
    given = problem(shape, dtype, layout)
    for got, expected in zip(kronecker_gather_triton(*given, True), formula(*given), strict=True):
        assert got.dtype == torch.float32
        close(got, expected, 1e-5)


@needs_triton
def test_without_energies_the_kernel_gives_the_same_coordinates():
    given = problem((5, 3, 4, 5), torch.float16, "columns")
    (got, none), (expected, _) = kronecker_gather_triton(*given, False), kronecker_gather_triton(*given, True)
    assert torch.equal(got, expected)
    assert none.shape == kronecker_gather_reference(*given, False)[1].shape == (0, 5)


@needs_triton
def test_factors_that_do_not_fit_take_the_projection():
    given = problem((2, 1, 131, 3), torch.bfloat16)
    close(kronecker_gather_triton(*given, False)[0], formula(*given)[0], 2**-6)


def test_the_op_keeps_its_contract():
    torch.library.opcheck(kronecker_gather, (*problem((5, 3, 4, 5), torch.bfloat16, "columns"), True))
    torch.library.opcheck(kronecker_gather, (*problem((5, 3, 4, 5), torch.float32), False))


def spec(size: int, dtype: str, transposed: bool, target: str) -> Spec:
    element = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    types = {
        "table_ptr": "*i64", "slot_ptr": "*i32",
        **dict.fromkeys(("left_ptr", "right_ptr", "coordinates_ptr", "energy_ptr"), "*fp32"),
        **dict.fromkeys(("M", "R", "stride_m", "stride_n"), "i32"),
    }  # fmt: skip
    constants = {"ELEMENT": NAMES[dtype], "ENERGY": True, "stride_m" if transposed else "stride_n": 1}
    kernel = "experiments.kronecker_gather:kronecker_gather_kernel"
    return tiled_spec(kernel, blocks(size, size, element, transposed), types, dtype, target, **constants)


@needs_triton
@pytest.mark.aot
def test_the_kernel_compiles_for_gpus_without_spills(monkeypatch, target):
    as_on_a_gpu(monkeypatch)
    sizes = [(64, "bf16", False), (64, "bf16", True), (32, "bf16", False)]  # 4096 and 1024 columns
    if target == "sm_90":
        sizes += [(64, "fp32", False)]
    compile_ahead(target, *(spec(*size, target) for size in sizes))
