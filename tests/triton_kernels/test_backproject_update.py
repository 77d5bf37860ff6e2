"""The weight update: reference against float64, kernel against reference, rounding of bfloat16, compiled code."""

from typing import Any

import pytest
import torch
from ahead_of_time import Spec, compile_ahead
from kernel_inputs import LAYOUTS, laid_out, needs_triton
from kernel_oracles import (
    check_seeds_keep_steps_on_average,
    check_seeds_round_to_a_neighbour,
    close,
    updated,
    updated_weights,
)
from pairwise import pairwise
from torch import Tensor

from lightspan.triton_kernels import backproject_update as module
from lightspan.triton_kernels.backproject_update import (
    backproject_update,
    backproject_update_reference,
    backproject_update_triton,
    blocks,
    update,
)
from lightspan.triton_kernels.rounding import WINDOW

PATHS = [backproject_update_reference, pytest.param(backproject_update_triton, marks=needs_triton)]

SHAPES = [(1, 1, 1), (3, 2, 5), (65, 131, 17), (64, 70, 33), (5, 4, 0)]  # M, N, R
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # one rounding of the result


def problem(
    shape: tuple[int, int, int], dtype: torch.dtype, residual: bool, layout: str = "rows",
    gradient_dtype: torch.dtype | None = None, gradient_layout: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the op by name. The step U Q^T consists of small integers, which are exact in every dtype."""
    M, N, R = shape
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=wide)

    gradients = [normal(M, N).to(gradient_dtype or dtype) for _ in range(2 if residual else 0)]
    return {
        "weights": [laid_out(normal(M, N).to(dtype), layout) for _ in range(2)],
        "direction_BMR": torch.randint(-2, 3, (2, M, R), generator=generator).to(wide),
        "frame_BNR": torch.randint(-1, 2, (2, N, R), generator=generator).to(wide),
        "gradients": [laid_out(gradient, gradient_layout or layout) for gradient in gradients],
        "scale_BM": normal(2 if residual else 0, M).abs(),
        "lr": torch.tensor(0.25, dtype=wide),
        "keep": torch.tensor(0.9, dtype=wide),
        "seed": None,
    }


def formula(problem: dict[str, Any]) -> Tensor:
    return updated_weights(problem, problem["frame_BNR"])


def rounding(path: Any, dtype: torch.dtype) -> float:
    """Triton's interpreter truncates to bfloat16, where the hardware rounds to nearest."""
    truncates = path is backproject_update_triton and dtype == torch.bfloat16
    return 2 * TOLERANCE[dtype] if truncates else TOLERANCE[dtype]


def near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    # Terms of about 10 may cancel: float32's sums err by 10 * 2^-23 in any dtype.
    close(got.to(expected.dtype), expected, tolerance, 1e-14 if got.dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("path", PATHS)
@pairwise(shape=SHAPES, layout=LAYOUTS, dtype=TOLERANCE, residual=[False, True])
def test_both_paths_equal_the_formula_in_float64(path, residual, shape, layout, dtype):
    given = problem(shape, dtype, residual, layout)
    near(updated(path, given), formula(given), rounding(path, dtype))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_float64_is_computed_in_float64(layout):
    given = problem((7, 5, 3), torch.float64, True, layout)
    near(updated(backproject_update, given), formula(given), 1e-14)
    near(updated(backproject_update_triton, given), formula(given), 1e-14)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weight_layout", ["rows", "columns"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_gradients_may_differ_from_weights_in_dtype_and_layout(path, weight_layout, dtypes):
    other = {"rows": "columns", "columns": "rows"}[weight_layout]
    given = problem((7, 5, 3), dtypes[0], True, weight_layout, gradient_dtype=dtypes[1], gradient_layout=other)
    near(updated(path, given), formula(given), rounding(path, dtypes[0]))


@pytest.mark.parametrize("path", PATHS)
def test_frames_and_directions_may_be_bfloat16(path):
    given = problem((7, 5, 3), torch.float32, False)
    given = given | {name: given[name].bfloat16() for name in ("frame_BNR", "direction_BMR")}
    near(updated(path, given), formula(given), TOLERANCE[torch.float32])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nothing_moves_without_step_and_decay(path, dtype):
    given = problem((7, 5, 3), dtype, False)
    still = {"direction_BMR": torch.zeros(2, 7, 3), "keep": torch.tensor(1.0), "seed": torch.tensor(1)}
    assert torch.equal(updated(path, given, **still), torch.stack(given["weights"]))


@pytest.mark.parametrize("path", PATHS)
def test_seeds_make_bfloat16_one_of_the_two_neighbours(path):
    given = problem((33, 40, 3), torch.bfloat16, True, "columns")
    check_seeds_round_to_a_neighbour(path, given)


@pytest.mark.parametrize("path", PATHS)
def test_seeds_keep_steps_on_average_that_nearest_loses(path):
    M, N = 200, 300
    given = {
        "weights": [torch.ones(M, N, dtype=torch.bfloat16) for _ in range(2)],
        "direction_BMR": torch.full((2, M, 1), -(2.0**-12)), "frame_BNR": torch.ones(2, N, 1), "gradients": [],
        "scale_BM": torch.empty(0, M), "lr": torch.tensor(1.0), "keep": torch.tensor(1.0), "seed": None,
    }  # fmt: skip
    check_seeds_keep_steps_on_average(path, given)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiles_of_the_reference_change_nothing(monkeypatch, dtype, layout):
    given = problem((65, 131, 17), dtype, True, layout)
    whole = updated(backproject_update_reference, given)
    monkeypatch.setattr(module, "WINDOW", 300)
    assert torch.equal(updated(backproject_update_reference, given), whole)


@pytest.mark.parametrize("shape", [(2, WINDOW + 5), (1400, 700)])
def test_rows_beyond_a_window_and_several_tiles_have_noise_of_their_own(shape):
    weight = torch.ones(shape, dtype=torch.bfloat16)
    nothing = torch.empty(1, shape[0], 0), torch.empty(1, shape[1], 0), [], torch.empty(0, shape[0])
    between = torch.tensor(1 + 2.0**-8)  # halfway to the next bfloat16
    backproject_update([weight], *nothing, torch.tensor(0.0), between, torch.tensor(3))
    first, second = weight.flatten()[: 2 * (weight.numel() // 2)].chunk(2)
    assert (first != second).double().mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_an_update_by_whole_steps_decays_and_subtracts_them(layout):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = problem((5, 4, 0), dtype, True, layout)
        expected = [
            0.9 * w.double() - 0.25 * s.double() for w, s in zip(given["weights"], given["gradients"], strict=True)
        ]
        update(given["weights"], given["gradients"], given["lr"], given["keep"], None)
        for weight, right in zip(given["weights"], expected, strict=True):
            torch.testing.assert_close(weight.double(), right, rtol=TOLERANCE.get(dtype, 1e-14), atol=1e-6)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_is_registered_soundly(dtype, residual):
    given = problem((7, 5, 3), dtype, residual)
    torch.library.opcheck(backproject_update, tuple({**given, "seed": torch.tensor(1)}.values()))


def spec(
    rank: int, dtype: str, precision: str = "ieee", transposed: bool = False, residual: bool = True, seeded: bool = True
) -> Spec:
    sizes = blocks(rank, 2 if dtype == "bf16" else 4)
    element, one = {"bf16": "tl.bfloat16", "fp32": "tl.float32"}[dtype], "m" if transposed else "n"
    flags = {"BACKPROJECT": rank > 0, "SEEDED": seeded, "ALIGNED": True, "UPCAST": False, "PRECISION": precision}
    constants = {"WEIGHT": element, "GRADIENT": element if residual else None, f"weight_stride_{one}": 1, **flags}
    constants |= {name: size for name, size in sizes.items() if name.isupper()}
    if residual:
        constants |= {f"gradient_stride_{one}": 1}
    else:
        constants |= {"gradients_ptr": None, "scale_ptr": None}
    if not seeded:
        constants |= {"seed_ptr": None}
    types = {
        "weights_ptr": "*i64", "direction_ptr": f"*{dtype}", "frame_ptr": f"*{dtype}", "gradients_ptr": "*i64",
        "scale_ptr": "*fp32", "lr_ptr": "*fp32", "keep_ptr": "*fp32", "seed_ptr": "*i64",
        **dict.fromkeys(("M", "N", "R", "weight_stride_m", "weight_stride_n"), "i32"),
        **dict.fromkeys(("gradient_stride_m", "gradient_stride_n"), "i32"),
    }  # fmt: skip
    types = {name: kind for name, kind in types.items() if name not in constants}
    matrix_instructions = rank > 0 and (dtype == "bf16" or precision == "tf32")
    options = {"num_warps": sizes["num_warps"]}
    return Spec(
        "backproject_update:backproject_update_kernel", types, constants, list(types), matrix_instructions, options
    )


@needs_triton
@pytest.mark.aot
def test_the_kernel_compiles_for_gpus_without_spills(target):
    compile_ahead(
        target,
        spec(64, "bf16", residual=False),
        spec(128, "bf16"),
        spec(256, "bf16", transposed=True),
        spec(0, "bf16"),
        spec(128, "fp32", "tf32", seeded=False),
        spec(128, "fp32", "ieee", seeded=False),
        spec(0, "fp32", seeded=False),
    )
