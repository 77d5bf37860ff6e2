"""The whole step in one kernel: against torch's Adam in coordinates, against the three operations; its rounding."""

import pytest
import torch
from ahead_of_time import Spec, compile_ahead
from kernel_inputs import needs_triton
from kernel_oracles import projection, updated_weights
from torch import Tensor

from lightspan.experiments import row_resident_step as module
from lightspan.experiments.row_resident_step import (
    blocks,
    row_resident_step,
    row_resident_step_reference,
    row_resident_step_triton,
)

implementations = pytest.mark.parametrize(
    "step", [row_resident_step_reference, pytest.param(row_resident_step_triton, marks=needs_triton)]
)
SHAPES = [(1, 1, 1, 1), (2, 5, 7, 3), (3, 17, 40, 31), (1, 70, 65, 33)]  # B M N R
CONSTANTS = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}


def problem(
    shape: tuple[int, int, int, int], weight: torch.dtype, gradient: torch.dtype, *, wide: bool = False
) -> dict:
    """Arguments, the same at every call; the matrices are views inside larger ones, transposed if `wide`."""
    B, M, N, R = shape
    generator = torch.Generator().manual_seed(0)

    def matrices(dtype: torch.dtype) -> list[Tensor]:
        sizes = (N + 2, M + 3) if wide else (M + 3, N + 2)
        whole = [torch.randn(sizes, generator=generator).to(dtype) for _ in range(B)]
        return [matrix.mT[:M, :N] if wide else matrix[:M, :N] for matrix in whole]

    return {
        "weights": matrices(weight),
        "gradients": matrices(gradient),
        "frame_BNR": torch.randn(B, N, R, generator=generator) / N**0.5,
        "m_BMR": torch.randn(B, M, R, generator=generator),
        "v_BMR": torch.rand(B, M, R, generator=generator),
        "age_BR": torch.randint(1, 100, (B, R), generator=generator).float(),
        "lr": torch.tensor(0.02),
        "keep": torch.tensor(0.9),
        "seed": None,
        **CONSTANTS,
    }


def in_float64(arguments: dict, frame: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, moments and direction after the step, from the formulas, with the frame rounded to `frame`."""
    frame_BNR, age = arguments["frame_BNR"].to(frame), arguments["age_BR"].double()[:, None]
    g, _ = projection(arguments["gradients"], frame_BNR)
    m = 0.9 * arguments["m_BMR"].double() + 0.1 * g
    v = 0.99 * arguments["v_BMR"].double() + 0.01 * g**2
    u = m / (1 - 0.9**age) / ((v / (1 - 0.99**age)).sqrt() + 1e-8)
    return updated_weights(arguments | {"direction_BMR": u, "gradients": []}, frame_BNR), m, v, u


@implementations
def test_steps_are_those_of_torchs_adam_in_coordinates(step):
    arguments = problem((2, 9, 8, 4), torch.float32, torch.float32)
    weight = torch.stack(arguments["weights"]).double()
    coordinates = torch.zeros(2, 9, 4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([coordinates], lr=1.0, betas=(0.9, 0.99), eps=1e-8)
    frame_BNR, generator = arguments["frame_BNR"].double(), torch.Generator().manual_seed(1)
    for name in ("m_BMR", "v_BMR", "age_BR"):
        arguments[name].zero_()
    for _ in range(4):
        gradients = torch.randn(2, 9, 8, generator=generator)
        before, coordinates.grad = coordinates.detach().clone(), gradients.double() @ frame_BNR
        adam.step()
        weight = 0.9 * weight + 0.02 * (coordinates.detach() - before) @ frame_BNR.mT
        arguments["gradients"], arguments["age_BR"] = list(gradients), arguments["age_BR"] + 1
        step(**arguments)
    # Four steps of float32 on numbers around one.
    torch.testing.assert_close(torch.stack(arguments["weights"]).double(), weight, atol=3e-6, rtol=0)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("gradient", [torch.float32, torch.float16])
def test_the_kernel_equals_the_three_operations(shape, wide, gradient):
    expected, got = (problem(shape, torch.float32, gradient, wide=wide) for _ in range(2))
    row_resident_step_reference(**expected)
    row_resident_step_triton(**got)
    # The kernel multiplies float16 gradients with a float16 frame, the reference both in float32.
    slack = 1e-5 if gradient == torch.float32 else 3e-3
    for name in ("m_BMR", "v_BMR"):
        torch.testing.assert_close(got[name], expected[name], atol=slack, rtol=slack)
    for mine, others in zip(got["weights"], expected["weights"], strict=True):
        torch.testing.assert_close(mine, others, atol=slack, rtol=slack)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float32])
def test_bfloat16_weights_are_rounded_once(shape, gradient):
    arguments = problem(shape, torch.bfloat16, gradient)
    weight, m, v, u = in_float64(arguments, torch.bfloat16 if gradient == torch.bfloat16 else torch.float32)
    row_resident_step_triton(**arguments)
    torch.testing.assert_close(arguments["m_BMR"].double(), m, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(arguments["v_BMR"].double(), v, atol=1e-5, rtol=1e-5)
    # A unit in the last place is at most 2^-7: of the weight, and of both factors of every product in the step. The
    # interpreter cuts off what bfloat16 has no room for; GPUs round to nearest and err by half of that.
    step = 0.02 * u.abs() @ arguments["frame_BNR"].double().abs().mT
    limit = 2**-7 * (weight.abs() + 2.02 * step) + 1e-5
    assert ((torch.stack(arguments["weights"]).double() - weight).abs() <= limit).all()


@needs_triton
@pytest.mark.parametrize("wide", [False, True])
def test_nothing_beside_the_matrices_is_written(wide):
    arguments = problem((2, 5, 7, 3), torch.bfloat16, torch.bfloat16, wide=wide)
    before = [weight._base.clone() for weight in arguments["weights"]]
    row_resident_step_triton(**arguments)
    for weight, whole in zip(arguments["weights"], before, strict=True):
        (whole.mT if wide else whole)[:5, :7] = weight
        assert torch.equal(weight._base, whole)


@implementations
def test_a_seed_rounds_bfloat16_weights_to_a_neighbour_that_is_right_on_average(step):
    def decayed(seed: int | None) -> Tensor:
        """Ones times 0.999 with no gradient; the neighbours of 0.999 are 255/256 and 1."""
        arguments = problem((1, 64, 64, 4), torch.bfloat16, torch.bfloat16)
        arguments["weights"][0].fill_(1.0)
        for tensor in (arguments["gradients"][0], arguments["m_BMR"]):
            tensor.zero_()
        arguments |= {"keep": torch.tensor(0.999), "seed": None if seed is None else torch.tensor(seed)}
        step(**arguments)
        return arguments["weights"][0].double()

    assert step is row_resident_step_triton or (decayed(None) == 1).all()  # the interpreter rounds towards zero
    assert set(decayed(1).unique().tolist()) == {255 / 256, 1.0}
    assert torch.equal(decayed(1), decayed(1))
    assert not torch.equal(decayed(1), decayed(2))
    # Four standard errors of 4096 weights that go down with probability 0.256.
    assert abs(decayed(3).mean() - 0.999) < 4 * (0.256 * 0.744 / 4096) ** 0.5 / 256


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_the_kernel_does_not_hold_takes_the_three_operations(dtype, monkeypatch):
    monkeypatch.setattr(module, "row_resident_step_kernel", None)
    monkeypatch.setattr(module, "MAX_RANK", 3)
    expected, got = (problem((2, 3, 5, 4), dtype, dtype) for _ in range(2))
    for arguments in (expected, got):
        arguments |= {name: arguments[name].to(dtype) for name in ("frame_BNR", "m_BMR", "v_BMR", "age_BR")}
    row_resident_step_reference(**expected)
    row_resident_step_triton(**got)
    for mine, others in zip((*got["weights"], got["v_BMR"]), (*expected["weights"], expected["v_BMR"]), strict=True):
        torch.testing.assert_close(mine, others, atol=1e-6, rtol=1e-5)


def test_the_operator_is_well_formed():
    arguments = problem((2, 3, 4, 2), torch.bfloat16, torch.float32) | {"seed": torch.tensor(4)}
    torch.library.opcheck(row_resident_step, (), arguments)


def specification(rank: int, dtype: str, precision: str, *, wide: bool) -> Spec:
    """The kernel as the launcher specialises it for sizes in multiples of 16; a wide matrix comes in transposed."""
    half = dtype == "bfloat16"
    tile, moving = blocks(rank, 2 if half else 4), "n" if wide else "m"
    types = dict.fromkeys(("weight_table_ptr", "gradient_table_ptr"), "*i64")
    types |= {"frame_ptr": "*bf16" if half else "*fp32"}
    names = ("m", "v", "correction1", "correction2", "lr", "keep")
    types |= dict.fromkeys((f"{name}_ptr" for name in names), "*fp32")
    types |= {"seed_ptr": "*i64"} if half else {}
    types |= dict.fromkeys(("weight1", "weight2", "eps"), "fp32")
    types |= dict.fromkeys(("M", "N", "R", f"weight_stride_{moving}", f"gradient_stride_{moving}"), "i32")
    still = "m" if wide else "n"
    constants = {f"weight_stride_{still}": 1, f"gradient_stride_{still}": 1}
    constants |= dict.fromkeys(("WEIGHT", "GRADIENT", "STEP"), f"tl.{dtype}")
    constants |= {"WEIGHTS_ALIGNED": True, "GRADIENTS_ALIGNED": True, "UPCAST": False, "PRECISION": precision}
    constants |= {name: size for name, size in tile.items() if name.startswith("BLOCK")}
    return Spec(
        kernel="experiments.row_resident_step:row_resident_step_kernel",
        types=types,
        constants=constants if half else constants | {"seed_ptr": None},
        aligned=[name for name, kind in types.items() if kind != "fp32"],
        tensor_cores=precision == "tf32",
        options={"num_warps": tile["num_warps"]},
    )


@needs_triton
@pytest.mark.aot
def test_the_kernel_compiles_ahead_of_time_without_spills_for_tensor_cores(target):
    compile_ahead(
        target,
        specification(64, "bfloat16", "tf32", wide=False),
        specification(128, "bfloat16", "tf32", wide=True),
        specification(256, "bfloat16", "tf32", wide=False),
        specification(128, "float32", "ieee", wide=False),
    )
