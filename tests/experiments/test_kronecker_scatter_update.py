"""The weight update in a Kronecker basis: reference, kernel, rounding of bfloat16, compiled code."""

from typing import Any

import pytest
import torch
from ahead_of_time import Spec, compile_ahead
from kernel_inputs import LAYOUTS, laid_out, needs_triton
from kernel_oracles import (
    NAMES,
    as_on_a_gpu,
    check_seeds_keep_steps_on_average,
    check_seeds_round_to_a_neighbour,
    close,
    kronecker_frame,
    tiled_spec,
    updated,
    updated_weights,
)
from torch import Tensor

from lightspan.experiments.kronecker_scatter_update import (
    kronecker_scatter_update,
    kronecker_scatter_update_reference,
    kronecker_scatter_update_triton,
)
from lightspan.triton_kernels.tiles import blocks

PATHS = [kronecker_scatter_update_reference, pytest.param(kronecker_scatter_update_triton, marks=needs_triton)]

SHAPES = [(1, 1, 1, 1), (5, 3, 4, 5), (17, 1, 13, 13), (3, 20, 33, 7), (4, 3, 4, 0)]  # M, a, b, R
# One rounding of the result; of bfloat16 two, since the interpreter truncates and the reference rounds the product too.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}


def problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype, residual: bool = True, layout: str = "rows",
    gradient_layout: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the op by name. Factors and direction hold small integers, so that U Q^T is exact in every dtype."""
    (M, a, b, R), generator = shape, torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=wide)

    def integers(*size: int) -> Tensor:
        return torch.randint(-1, 2, size, generator=generator).to(wide)

    return {
        "weights": [laid_out(normal(M, a * b).to(dtype), layout) for _ in range(2)],
        "direction_BMR": integers(2, M, R),
        "columns_BR": torch.stack([torch.randperm(a * b, generator=generator)[:R] for _ in range(2)]),
        "left_aa": integers(a, a),
        "right_bb": integers(b, b),
        "gradients": [laid_out(normal(M, a * b).to(dtype), gradient_layout or layout) for _ in range(2 * residual)],
        "scale_BM": normal(2 if residual else 0, M).abs(),
        "lr": torch.tensor(0.25, dtype=wide),
        "keep": torch.tensor(0.9, dtype=wide),
        "seed": None,
    }


def formula(problem: dict[str, Any]) -> Tensor:
    frame_BNR = kronecker_frame(problem["columns_BR"], problem["left_aa"], problem["right_bb"])
    return updated_weights(problem, frame_BNR)


def near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    # Terms of about 10 may cancel: float32's sums err by 10 * 2^-23 in any dtype.
    close(got.to(expected.dtype), expected, tolerance, 1e-13 if got.dtype == torch.float64 else 4e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_paths_equal_the_formula_in_float64(path, residual, shape, layout, dtype):
    given = problem(shape, dtype, residual, layout)
    near(updated(path, given), formula(given), TOLERANCE[dtype])


@pytest.mark.parametrize("path", PATHS)
def test_float16_weights_are_rounded_once(path):
    given = problem((5, 3, 4, 5), torch.float16)
    near(updated(path, given), formula(given), TOLERANCE[torch.float16])


@pytest.mark.parametrize("path", PATHS)
def test_float64_is_computed_in_float64(path):
    given = problem((7, 3, 5, 4), torch.float64)
    near(updated(path, given), formula(given), 1e-14)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layouts", [("rows", "columns"), ("columns", "rows")])
def test_gradients_may_differ_from_weights_in_dtype_and_layout(path, layouts):
    given = problem((7, 3, 4, 3), torch.float32, True, *layouts)
    given["gradients"] = [gradient.bfloat16() for gradient in given["gradients"]]
    near(updated(path, given), formula(given), TOLERANCE[torch.float32])


@pytest.mark.parametrize("path", PATHS)
def test_nothing_moves_without_step_and_decay(path):
    given = problem((7, 3, 4, 3), torch.bfloat16, residual=False)
    still = {"direction_BMR": torch.zeros(2, 7, 3), "keep": torch.tensor(1.0), "seed": torch.tensor(1)}
    assert torch.equal(updated(path, given, **still), torch.stack(given["weights"]))


def test_it_undoes_the_gather():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for n in (3, 4))
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    columns_BR = torch.randperm(12, generator=generator)[None]
    coordinates, _ = torch.ops.lightspan.kronecker_gather([weight], columns_BR, left, right, False)
    one = torch.tensor(1.0, dtype=torch.float64)
    none = [], torch.empty(0, 5, dtype=torch.float64)
    kronecker_scatter_update([weight], coordinates, columns_BR, left, right, *none, one, one, None)
    torch.testing.assert_close(weight, torch.zeros_like(weight), atol=1e-13, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_seeds_make_bfloat16_one_of_the_two_neighbours(path, layout):
    given = problem((19, 4, 8, 3), torch.bfloat16, True, layout)
    check_seeds_round_to_a_neighbour(path, given)


@pytest.mark.parametrize("path", PATHS)
def test_seeds_keep_steps_on_average_that_nearest_loses(path):
    M, size = 48, 32
    given = {
        "weights": [torch.ones(M, size * size, dtype=torch.bfloat16) for _ in range(2)],
        "direction_BMR": torch.full((2, M, size * size), -(2.0**-12)),
        "columns_BR": torch.arange(size * size).expand(2, -1),
        "left_aa": torch.eye(size), "right_bb": torch.eye(size), "gradients": [], "scale_BM": torch.empty(0, M),
        "lr": torch.tensor(1.0), "keep": torch.tensor(1.0), "seed": None,
    }  # fmt: skip
    check_seeds_keep_steps_on_average(path, given)


@needs_triton
def test_factors_that_do_not_fit_take_the_back_projection():
    given = problem((2, 1, 131, 3), torch.bfloat16)
    near(updated(kronecker_scatter_update_triton, given), formula(given), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("residual", [False, True])
def test_the_op_keeps_its_contract(residual):
    given = problem((5, 3, 4, 5), torch.bfloat16, residual, "columns")
    torch.library.opcheck(kronecker_scatter_update, tuple({**given, "seed": torch.tensor(1)}.values()))


def spec(size: int, dtype: str, transposed: bool, residual: bool, target: str) -> Spec:
    element = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    seeded, one = dtype == "bf16", "m" if transposed else "n"
    types = {
        "weights_ptr": "*i64", "gradients_ptr": "*i64", "slot_ptr": "*i32", "seed_ptr": "*i64",
        **dict.fromkeys(("direction_ptr", "left_ptr", "right_ptr", "scale_ptr", "lr_ptr", "keep_ptr"), "*fp32"),
        **dict.fromkeys(("M", "R", "weight_stride_m", "weight_stride_n"), "i32"),
        **dict.fromkeys(("gradient_stride_m", "gradient_stride_n"), "i32"),
    }  # fmt: skip
    constants = {"WEIGHT": NAMES[dtype], "GRADIENT": NAMES[dtype] if residual else None, "SEEDED": seeded}
    constants |= {f"weight_stride_{one}": 1} | ({} if seeded else {"seed_ptr": None})
    constants |= {f"gradient_stride_{one}": 1} if residual else {"gradients_ptr": None, "scale_ptr": None}
    kernel = "experiments.kronecker_scatter_update:kronecker_scatter_update_kernel"
    return tiled_spec(kernel, blocks(size, size, element, transposed, tiles=2), types, dtype, target, **constants)


@needs_triton
@pytest.mark.aot
def test_the_kernel_compiles_for_gpus_without_spills(monkeypatch, target):
    as_on_a_gpu(monkeypatch)
    sizes = [(64, "bf16", False, True), (64, "bf16", True, True), (32, "bf16", False, False)]  # 4096 and 1024 columns
    if target == "sm_90":
        sizes += [(64, "fp32", False, True)]
    compile_ahead(target, *(spec(*size, target) for size in sizes))
