"""Error feedback: what is stored comes back, what a step leaves out is not lost, kernels agree with the reference."""

import pytest
import torch
from ahead_of_time import Spec, compile_ahead
from kernel_inputs import needs_triton
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.triton_kernels import error_feedback
from lightspan.triton_kernels.error_feedback import (
    BLOCK,
    LARGEST_CODE,
    STORAGE,
    add_error,
    blocks,
    quantise_error,
    zero_error,
)

CPU = torch.device("cpu")
ONE = torch.tensor(1.0)
# share of its own size by which a float format may move a number
ROUNDING = {"float64": 0.0, "float32": 0.0, "bfloat16": 2.0**-8}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers: products and sums of them are exact, whatever the order of summation."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


def stored(error_BMN: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    batch, rows, columns = error_BMN.shape
    codes, scales = zero_error(batch, rows, columns, storage, CPU)
    nothing = torch.zeros(batch, rows, 1), torch.zeros(batch, columns, 1)
    quantise_error(list(error_BMN), *nothing, 0.0, codes, scales)
    return codes, scales


def loaded(codes: Tensor, scales: Tensor, columns: int) -> Tensor:
    batch, rows, _ = codes.shape
    return add_error(list(torch.zeros(batch, rows, columns)), codes, scales, ONE)


def half_steps(scales_BMS: Tensor, columns: int) -> Tensor:
    return 0.5 * scales_BMS.repeat_interleave(BLOCK, dim=2)[..., :columns]


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 128), (2, 2, 257), (1, 5, 300)])
def test_a_stored_error_comes_back_within_half_a_step_of_its_block(storage: str, shape: tuple[int, int, int]) -> None:
    dtype = torch.float64 if storage == "float64" else torch.float32
    error = normal(*shape, dtype=dtype) * torch.logspace(-6, 6, shape[1], dtype=dtype)[:, None]
    codes, scales = stored(error, storage)
    if storage in ROUNDING:
        allowed = ROUNDING[storage] * error.abs()
    else:
        largest = LARGEST_CODE[codes.dtype]
        allowed = half_steps(scales, shape[2]) * (1 + 2.0**-22 * largest)  # scale and code are products rounded once
    assert ((loaded(codes, scales, shape[2]) - error).abs() <= allowed).all()


def test_eight_bit_codes_run_from_minus_127_to_127() -> None:
    error = torch.linspace(-3, 3, 255).expand(1, 1, 255)[..., :128].contiguous()
    codes, _ = stored(torch.cat((error, -error), dim=2), "int8")
    assert codes[0, 0, 0].item() == -127
    assert codes[0, 0, BLOCK].item() == 127
    assert torch.equal(codes[..., :BLOCK], -codes[..., BLOCK:])


def test_four_bit_codes_lie_in_the_low_nibble_for_even_columns_and_in_the_high_one_for_odd() -> None:
    # the largest entry is 7, so a step is 1; negative codes are 16 less their size; 2.6 is nearest to 3
    codes, scales = stored(torch.tensor([[[7.0, -1.0, 2.6, 0.0, -7.0]]]), "int4")
    assert codes.tolist() == [[[0xF7, 0x03, 0x09]]]
    assert scales.tolist() == [[[1.0]]]
    assert loaded(codes, scales, 5).tolist() == [[[7.0, -1.0, 3.0, 0.0, -7.0]]]


@pytest.mark.parametrize("columns", [1, 127, 129])
def test_the_half_byte_beyond_an_odd_last_column_is_zero(columns: int) -> None:
    codes, scales = stored(1 + normal(2, 3, columns).abs(), "int4")
    assert codes.shape[2] == (columns + 1) // 2
    assert (codes[..., -1] >> 4 == 0).all()
    assert (loaded(codes, scales, columns) > 0).all()


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_block_of_zeros_or_of_less_than_can_be_divided_by_stays_exactly_zero(storage: str) -> None:
    error = torch.zeros(1, 3, 2 * BLOCK)
    error[0, 1, BLOCK:] = 1e-40
    error[0, 2, :BLOCK] = 5.0
    codes, scales = stored(error, storage)
    got = loaded(codes, scales, 2 * BLOCK)
    assert got.isfinite().all()
    assert torch.equal(got[0, 2, :BLOCK], error[0, 2, :BLOCK])
    got[0, 2, :BLOCK] = 0
    assert not got.any()


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_an_outlier_coarsens_its_own_block_only(storage: str) -> None:
    error = normal(1, 2, 3 * BLOCK)
    _, before = stored(error, storage)
    error[0, 1, BLOCK] = 1e6
    _, after = stored(error, storage)
    assert (before != after).nonzero().tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("kept", [0.0, 0.95])
def test_what_is_stored_and_what_was_captured_make_up_the_input(storage: str, kept: float) -> None:
    dtype = torch.float64 if storage == "float64" else torch.float32
    a, frame = normal(2, 6, 150, dtype=dtype), torch.linalg.qr(normal(2, 150, 4, seed=1, dtype=dtype)).Q
    coordinates = a @ frame
    codes, scales = zero_error(2, 6, 150, storage, CPU)
    quantise_error(list(a), coordinates, frame, kept, codes, scales)
    back = loaded(codes, scales, 150) + (1 - kept) * coordinates @ frame.mT
    arithmetic = 1e-14 if storage == "float64" else 2e-6  # a few roundings of numbers below 5
    format_error = half_steps(scales, 150) if scales.numel() else ROUNDING[storage] * 5
    assert ((back - a).abs() <= format_error + arithmetic).all()


def test_full_rank_error_feedback_leaves_nothing() -> None:
    frame = torch.linalg.qr(normal(1, 7, 7, dtype=torch.float64)).Q
    a = normal(1, 3, 7, seed=1, dtype=torch.float64)
    codes, scales = zero_error(1, 3, 7, "float64", CPU)
    quantise_error(list(a), a @ frame, frame, 0.0, codes, scales)
    torch.testing.assert_close(codes, torch.zeros_like(codes), atol=1e-14, rtol=0)


@pytest.mark.parametrize("storage", STORAGE)
def test_clipping_scales_the_gradient_and_not_the_error(storage: str) -> None:
    error = integers(2, 3, 9)
    codes, scales = stored(error, storage)
    gradients = list(integers(2, 3, 9, seed=1).bfloat16())
    got = add_error(gradients, codes, scales, torch.tensor(0.25))
    torch.testing.assert_close(got, loaded(codes, scales, 9) + 0.25 * torch.stack(gradients).to(got.dtype))


def exact_case(shape: tuple[int, int, int, int], transposed: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    batch, rows, columns, rank = shape
    a = integers(batch, rows, columns)
    a[:, ::2] *= 8  # rows of different scales
    matrices = [m.T.contiguous().T if transposed else m.contiguous() for m in a]
    return matrices, integers(batch, rows, rank, seed=1), integers(batch, columns, rank, seed=2)


@pytest.mark.sample(5)
@needs_triton
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(
    ("shape", "transposed"), [((1, 1, 1, 1), False), ((2, 65, 131, 33), True), ((1, 3, 256, 16), False)]
)
def test_the_kernels_equal_the_reference(storage: str, shape: tuple[int, int, int, int], transposed: bool) -> None:
    batch, rows, columns, _ = shape
    a, coordinates, frame = exact_case(shape, transposed)
    expected, got = (zero_error(batch, rows, columns, storage, CPU) for _ in range(2))
    error_feedback.quantise_error_reference(a, coordinates, frame, 0.5, *expected)
    error_feedback.quantise_error_triton(a, coordinates, frame, 0.5, *got)
    # the interpreter cuts off what bfloat16 has no room for, where GPUs round to nearest
    cut = 2.0**-7 if storage == "bfloat16" else 0.0
    torch.testing.assert_close(got[0], expected[0], rtol=cut, atol=0)
    assert torch.equal(got[1], expected[1])
    gradients = [matrix.bfloat16() for matrix in a]
    clip = torch.tensor(0.5)
    fast = error_feedback.add_error_triton(gradients, *expected, clip)
    # the kernel may round a product and a sum together, the reference rounds both
    torch.testing.assert_close(fast, error_feedback.add_error_reference(gradients, *expected, clip), rtol=1e-6, atol=0)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernels_take_every_float_dtype(dtype: torch.dtype) -> None:
    a, coordinates, frame = exact_case((1, 5, 130, 3), False)
    coordinates, frame = coordinates.to(dtype), frame.to(dtype)
    expected, got = (zero_error(1, 5, 130, "int4", CPU) for _ in range(2))
    error_feedback.quantise_error_reference(a, coordinates, frame, 0.0, *expected)
    error_feedback.quantise_error_triton(a, coordinates, frame, 0.0, *got)
    assert torch.equal(got[0], expected[0])
    gradients = [matrix.to(dtype) for matrix in a]
    slow = error_feedback.add_error_reference(gradients, *expected, ONE)
    torch.testing.assert_close(error_feedback.add_error_triton(gradients, *expected, ONE), slow, rtol=1e-6, atol=0)


@pytest.mark.sample(2)
@pytest.mark.parametrize("storage", STORAGE)
def test_the_ops_keep_torchs_contract(storage: str) -> None:
    a, coordinates, frame = exact_case((2, 3, 5, 2), False)
    codes, scales = zero_error(2, 3, 5, storage, CPU)
    torch.library.opcheck(quantise_error, (a, coordinates, frame, 0.5, codes, scales))
    torch.library.opcheck(add_error, (a, codes, scales, ONE))


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="'int2' is unknown; choose one of float64, float32, bfloat16, int8, int4"):
        zero_error(1, 2, 3, "int2", CPU)
    with pytest.raises(
        UserError, match=r"codes of torch.int16 are not supported; store the error as one of torch.float64"
    ):
        add_error([torch.zeros(2, 3)], torch.zeros(1, 2, 3, dtype=torch.int16), torch.zeros(1, 2, 0), ONE)


def spec_of_quantise(codes: str, largest: int, operands: str, transposed: bool) -> Spec:
    """4096 x 4096 at rank 128, the operands in bfloat16 or in float32 by TF32."""
    one, wide = ("stride_m", "stride_n") if transposed else ("stride_n", "stride_m")
    pointers = {"coordinates_ptr": operands, "frame_ptr": operands, "codes_ptr": codes, "scales_ptr": "*fp32"}
    sizes = ("rows", "columns", "rank", "stored", "scales", wide)
    constants = {"ELEMENT": "tl.float32", "ALIGNED": True, "LARGEST": largest, "SMALLEST": error_feedback.SMALLEST}
    return Spec(
        "error_feedback:quantise_error_kernel",
        types={"table_ptr": "*i64", **pointers, "lost": "fp32", **dict.fromkeys(sizes, "i32")},
        constants={one: 1, **constants, "UPCAST": False, "PRECISION": "tf32", **blocks(128)},
        aligned=["table_ptr", *pointers, *sizes],
        tensor_cores=True,
        options={"num_warps": 8},
    )


def spec_of_add(codes: str, largest: int, transposed: bool) -> Spec:
    """4096 x 4096 of bfloat16 gradients."""
    one, wide = ("stride_m", "stride_n") if transposed else ("stride_n", "stride_m")
    pointers = {"codes_ptr": codes, "scales_ptr": "*fp32", "clip_ptr": "*fp32", "out_ptr": "*fp32"}
    sizes = ("rows", "columns", "stored", "scales", wide)
    tile = {"BLOCK_M": blocks(1)["BLOCK_M"], "BLOCK": BLOCK}
    return Spec(
        "error_feedback:add_error_kernel",
        types={"table_ptr": "*i64", **pointers, **dict.fromkeys(sizes, "i32")},
        constants={one: 1, "ELEMENT": "tl.bfloat16", "ALIGNED": True, "LARGEST": largest, **tile},
        aligned=["table_ptr", *pointers, *sizes],
        options={"num_warps": 8},
    )


@needs_triton
@pytest.mark.aot
def test_the_kernels_compile_ahead_of_time(target: str) -> None:
    compile_ahead(
        target,
        spec_of_quantise("*u8", 7, "*bf16", transposed=False),
        spec_of_quantise("*i8", 127, "*fp32", transposed=True),
        spec_of_add("*u8", 7, transposed=True),
        spec_of_add("*i8", 127, transposed=False),
    )
