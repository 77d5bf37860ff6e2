"""Coordinates and row energies: reference against float64, kernel against reference, layouts, compiled code."""

import pytest
import torch
from ahead_of_time import Spec, compile_ahead
from kernel_inputs import LAYOUTS, laid_out, needs_triton
from kernel_oracles import close, projection
from torch import Tensor

from lightspan.triton_kernels.project import blocks, project, project_reference, project_triton

SHAPES = [(1, 1, 1), (3, 2, 5), (65, 70, 17), (64, 131, 33), (2, 5, 300)]  # M, N, R; 300 takes two tiles of the rank
# A product of bfloat16 is rounded to it once, by at most 2^-9; the sums of float32 err by less than 1e-5 here.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 1e-5}


def problem(shape: tuple[int, int, int], dtype: torch.dtype, layout: str = "rows") -> tuple[list[Tensor], Tensor]:
    M, N, R = shape
    generator = torch.Generator().manual_seed(0)
    gradients = [laid_out(torch.randn(M, N, generator=generator).to(dtype), layout) for _ in range(2)]
    frame_BNR = torch.randn(2, N, R, generator=generator) / N**0.5
    # Numbers that every operand type holds, so that only sums and products are compared.
    return gradients, frame_BNR.to(dtype).to(torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_reference_equals_the_product_in_float64(shape, layout, dtype):
    gradients, frame_BNR = problem(shape, dtype, layout)
    coordinates_BMR, energy_BM = project(gradients, frame_BNR, True)
    expected = projection(gradients, frame_BNR)
    close(coordinates_BMR, expected[0], TOLERANCE[dtype])
    close(energy_BM, expected[1], 1e-5)  # summed in float32 whatever the gradient's dtype
    assert coordinates_BMR.dtype == energy_BM.dtype == torch.float32
    assert coordinates_BMR.is_contiguous()


@pytest.mark.parametrize("gradient_dtype", [torch.float64, torch.float32])
def test_float64_frames_give_float64(gradient_dtype):
    gradients, frame_BNR = problem((6, 5, 4), gradient_dtype)
    expected = projection(gradients, frame_BNR)
    for got, wanted in zip(project(gradients, frame_BNR.double(), True), expected, strict=True):
        close(got, wanted, 1e-14)
        assert got.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_frames_kept_in_bfloat16_give_float32(dtype):
    gradients, frame_BNR = problem((6, 5, 4), dtype)
    narrow_BNR = frame_BNR.bfloat16()
    got, _ = project(gradients, narrow_BNR, False)
    assert got.dtype == torch.float32
    close(got, projection(gradients, narrow_BNR)[0], TOLERANCE.get(dtype, 1e-5))


def test_a_whole_orthonormal_frame_keeps_all_energy():
    gradients, _ = problem((7, 6, 1), torch.float64)
    frame_BNR = torch.linalg.qr(torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    coordinates_BMR, energy_BM = project(gradients, frame_BNR, True)
    close(energy_BM, coordinates_BMR.square().sum(dim=2), 1e-13)


@pytest.mark.sample(12)
@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_kernel_equals_the_reference(shape, layout, dtype):
    gradients, frame_BNR = problem(shape, dtype, layout)
    expected = project_reference(gradients, frame_BNR, True)
    for frame in (frame_BNR, frame_BNR.mT.contiguous().mT):
        got = project_triton(gradients, frame, True)
        close(got[0], expected[0], TOLERANCE[dtype])
        close(got[1], expected[1], 1e-5)
    without, none = project_triton(gradients, frame_BNR, False)
    assert torch.equal(without, got[0])
    assert none.shape == (0, shape[0])


@needs_triton
def test_the_kernel_reads_frames_kept_in_bfloat16():
    gradients, frame_BNR = problem((6, 5, 4), torch.float32)
    got, _ = project_triton(gradients, frame_BNR.bfloat16(), False)
    close(got, project_reference(gradients, frame_BNR.bfloat16(), False)[0], 1e-5)


@pytest.mark.parametrize("energy", [True, False])
def test_the_op_is_registered_soundly(energy):
    gradients, frame_BNR = problem((6, 5, 4), torch.float32)
    torch.library.opcheck(project, (gradients, frame_BNR, energy))


def spec(rank: int, dtype: str, precision: str = "ieee", transposed: bool = False, energy: bool = True) -> Spec:
    sizes = blocks(rank, 2 if dtype == "bf16" else 4)
    types = {"table_ptr": "*i64", "frame_ptr": f"*{dtype}", "coordinates_ptr": "*fp32", "energy_ptr": "*fp32"}
    types |= dict.fromkeys(("M", "N", "R", "stride_n" if transposed else "stride_m"), "i32")
    element = {"bf16": "tl.bfloat16", "fp32": "tl.float32"}[dtype]
    flags = {"ELEMENT": element, "ENERGY": energy, "ALIGNED": True, "UPCAST": False, "PRECISION": precision}
    return Spec(
        "project:project_kernel",
        types,
        {"stride_m" if transposed else "stride_n": 1, **flags, **{k: v for k, v in sizes.items() if k.isupper()}},
        aligned=list(types),
        tensor_cores=dtype == "bf16" or precision == "tf32",
        options={"num_warps": sizes["num_warps"]},
    )


@needs_triton
@pytest.mark.aot
def test_the_kernel_compiles_for_gpus_without_spills(target):
    specs = [spec(128, "bf16", transposed=True), spec(128, "bf16", energy=False)]
    for rank in (64, 128, 256, 512):
        specs += [spec(rank, "bf16"), spec(rank, "fp32", "tf32"), spec(rank, "fp32", "ieee")]
    compile_ahead(target, *specs)
