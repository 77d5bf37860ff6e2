"""Moments in bytes: neighbours, averages, exact values, of the reference and of the kernel (interpreted)."""

from collections.abc import Iterator

import pytest
import torch
from ahead_of_time import Spec, compile_ahead
from kernel_inputs import needs_triton
from torch import Tensor

from lightspan.triton_kernels import quantised_moments as module
from lightspan.triton_kernels.quantised_moments import (
    blocks,
    decode_first,
    decode_second,
    encode_first,
    encode_reference,
    encode_second,
    encode_triton,
)

CODES = {True: torch.arange(-127, 128).to(torch.int8), False: torch.arange(256).to(torch.uint8)}
SHAPES = [(2, 8, 64), (1, 1, 1), (2, 5, 3), (1, 2049, 1), (3, 17, 31), (1, 3, 1100)]


def by_reference(x_BMR: Tensor, seed: int, first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and the moments that they stand for."""
    codes_BMR, scale_BM = encode_reference(x_BMR, torch.tensor(seed), first=first)
    return codes_BMR, scale_BM, (decode_first if first else decode_second)(codes_BMR, scale_BM)


def by_kernel(x_BMR: Tensor, seed: int, first: bool) -> tuple[Tensor, Tensor, Tensor]:
    codes_BMR, scale_BM = encode_triton(x_BMR, torch.tensor(seed), first=first)
    return codes_BMR, scale_BM, (decode_first if first else decode_second)(codes_BMR, scale_BM)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch.sqrt splits even tensors this small; on a busy machine its threads wait for each other for milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


encoders = pytest.mark.parametrize("encode", [by_reference, pytest.param(by_kernel, marks=needs_triton)])
moments = pytest.mark.parametrize("first", [True, False])


def levels(first: bool) -> Tensor:
    """All levels at scale 1, ascending, by the formulas of the module's docstring in float64."""
    k = CODES[first].double()
    return (k / 127) ** 3 if first else (k / 255) ** 4


def sample(first: bool, shape: tuple[int, ...] = (2, 8, 64)) -> Tensor:
    """Magnitudes over five decades."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 10 ** (-5 * torch.rand(shape, generator=generator))
    return x if first else x.square()


@encoders
@moments
@pytest.mark.parametrize("shape", SHAPES)
def test_a_decoded_moment_is_one_of_the_two_neighbouring_levels(encode, first, shape):
    x = sample(first, shape)
    _, scale, decoded = encode(x, 3, first)
    torch.testing.assert_close(scale, x.abs().amax(-1), rtol=0, atol=0)
    relative = x.double() / scale[..., None].double()
    table = levels(first)
    upper = torch.searchsorted(table, relative).clamp_min(1)
    distance = torch.stack([table[upper - 1], table[upper]]) * scale[..., None] - decoded
    # The fourth power of k / 255 in float32 multiplies two roundings by four and adds three: 11 * 6e-8.
    assert (distance.abs().amin(0) <= 7e-7 * decoded.abs()).all()


@pytest.mark.sample(1)
@encoders
@moments
def test_a_decoded_moment_is_right_on_average(encode, first):
    x = sample(first, (1, 1, 64))
    x = x if first else x.clamp_min(4e-10 * x.max())  # above level 1, below which moments are held up
    shots = 64
    decoded = torch.stack([encode(x.expand(1, 32, 64).contiguous(), seed, first)[2] for seed in range(shots)])
    error = decoded.double().mean((0, 2)) - x.double().squeeze(1)
    standard_error = decoded.double().std((0, 2)) / (shots * 32) ** 0.5
    assert (error.abs() <= 4 * standard_error + 1e-7 * x.abs().squeeze(1)).all()


@pytest.mark.sample(4)
@encoders
@moments
@pytest.mark.parametrize("scale", [1.0, 0.37, 3e-12, 7e20])
def test_values_on_a_level_stay(encode, first, scale):
    codes = torch.zeros(1, 1, 256, dtype=CODES[first].dtype)
    codes[..., : len(CODES[first])] = CODES[first]
    decoded = (decode_first if first else decode_second)(codes, torch.full((1, 1), scale))
    for seed in range(8):
        again, _, _ = encode(decoded, seed, first)
        assert torch.equal(again, codes)


@encoders
@moments
@pytest.mark.parametrize("scale", [1.0, 0.37, 3e-12, 7e20])
def test_midway_between_the_codes_of_two_levels_numbers_go_to_either_and_to_no_third(encode, first, scale):
    """There the root may give the code above or below; only if it is off by half a code is neither a neighbour."""
    lower = torch.arange(127 if first else 255)
    share = ((lower + 0.5) / 127) ** 3 if first else ((lower + 0.5) / 255) ** 4
    x = torch.ones(1, 32, 256)
    x[..., : len(lower)] = share
    above = encode(x * scale, 0, first)[0][0, :, : len(lower)] - lower
    assert ((above == 0) | (above == 1)).all()
    assert (above.sum(0) > 0).all()
    assert (above[:, 1:].sum(0) < 32).all()  # a positive second moment never falls to level 0


@encoders
@moments
def test_a_block_of_zeros_stays_zeros_beside_others(encode, first):
    x = sample(first)
    x[1, 3] = 0
    codes, scale, decoded = encode(x, 0, first)
    assert not codes[1, 3].any()
    assert scale[1, 3] == 0
    assert not decoded[1, 3].any()
    assert decoded[1, 2].any()


@encoders
@moments
def test_blocks_of_one_element_are_exact(encode, first):
    x = sample(first, (1, 32, 1))
    assert torch.equal(encode(x, 0, first)[2], x)


@encoders
def test_a_positive_second_moment_is_never_stored_as_zero(encode):
    x = torch.full((1, 4, 64), 1e-20)
    x[..., 0] = 1.0
    codes, _, decoded = encode(x, 0, False)
    assert (codes[..., 1:] == 1).all()
    torch.testing.assert_close(decoded[..., 1:].sqrt(), torch.full((1, 4, 63), 255.0**-2))


@encoders
@moments
def test_seeds_decide_the_bits(encode, first):
    x = sample(first)
    codes = encode(x, 11, first)[0]
    assert torch.equal(codes, encode(x, 11, first)[0])
    assert not torch.equal(codes, encode(x, 12, first)[0])


@encoders
def test_both_moments_of_one_seed_are_rounded_independently(encode):
    # Both lie midway between levels, so that equal random numbers would send both up or both down.
    x = torch.full((1, 64, 64), 63.5)
    first, second = (x / 127) ** 3, (x / 255) ** 4
    first[..., 0], second[..., 0] = 1.0, 1.0
    up_first, up_second = encode(first, 5, True)[0][..., 1:] == 64, encode(second, 5, False)[0][..., 1:] == 64
    agreement = (up_first == up_second).double().mean()
    assert abs(agreement - 0.5) < 4 * 0.5 / (64 * 63) ** 0.5 + 0.01  # shares of ups are 0.5 within 1 %


def nearest(x_BMR: Tensor) -> Tensor:
    """Second moments rounded to the nearest level."""
    table, scale_BM1 = levels(False).float(), x_BMR.amax(-1, keepdim=True)
    upper = torch.searchsorted(table, x_BMR / scale_BM1).clamp_min(1)
    pair = torch.stack([table[upper - 1], table[upper]]) * scale_BM1
    return pair.gather(0, (pair - x_BMR).abs().argmin(0, keepdim=True))[0]


def test_a_second_moment_without_gradient_decays_where_rounding_to_nearest_would_freeze_it():
    # The largest number of the block is held by its gradient; a block that decays as a whole keeps its codes.
    v = torch.full((1, 4, 256), 0.5)
    v[..., 0] = 1.0
    rounded, frozen = v, nearest(v)
    for step in range(1500):
        rounded, frozen = rounded * 0.999, frozen * 0.999
        rounded[..., 0], frozen[..., 0] = 1.0, 1.0
        rounded = decode_second(*encode_second(rounded, torch.tensor(step)))
        frozen = nearest(frozen) if step < 10 else frozen
        if step == 9:
            assert torch.equal(frozen, nearest(v))
    # Roundings spread one number by 20 %, the mean of 1020 by 0.6 %.
    assert abs(rounded[..., 1:].mean() / (0.5 * 0.999**1500) - 1) < 0.03


@moments
def test_codes_move_as_their_moments_do(first):
    x = sample(first)
    codes, scale, decoded = by_reference(x, 0, first)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal((decode_first if first else decode_second)(codes[..., order], scale), decoded[..., order])


@moments
def test_stacks_longer_than_a_piece_are_encoded_to_their_end(first, monkeypatch):
    monkeypatch.setattr("lightspan.triton_kernels.quantised_moments.PIECE", 100)  # one row of 64 at a time
    x = sample(first)
    error = (by_reference(x, 0, first)[2] - x).abs()
    assert (error <= 0.024 * x.abs().amax(-1, keepdim=True)).all()  # the widest gap: 3 / 127 and 4 / 255 of the scale


@encoders
@moments
@pytest.mark.parametrize("nan", [0x7FC00000, -1])  # with a sign and a full payload is how a GPU may make it
def test_a_nan_shows_in_its_whole_row_alone(encode, first, nan):
    x = sample(first)
    x[0, 1, 5] = torch.tensor(nan, dtype=torch.int32).view(torch.float32)
    decoded = encode(x, 0, first)[2]
    assert decoded[0, 1].isnan().all()
    assert decoded.isnan().sum() == 64


@encoders
@moments
def test_strides_and_dtype_of_the_moments_do_not_matter(encode, first):
    x = sample(first, (2, 5, 7))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        expected = encode(x.to(dtype).float(), 1, first)
        for got, same in zip(encode(x.to(dtype).mT.contiguous().mT, 1, first), expected, strict=True):
            assert torch.equal(got, same)
            assert got.is_contiguous()


@encoders
@moments
def test_no_rows_are_no_codes(encode, first):
    codes, scale, _ = encode(torch.empty(2, 0, 5), 0, first)
    assert codes.shape == (2, 0, 5)
    assert scale.shape == (2, 0)


@needs_triton
@moments
def test_rows_beyond_a_programs_reach_take_the_reference(first, monkeypatch):
    monkeypatch.setattr(module, "MAX_RANK", 63)
    monkeypatch.setattr(module, "encode_kernel", None)
    for got, expected in zip(by_kernel(sample(first), 2, first), by_reference(sample(first), 2, first), strict=True):
        assert torch.equal(got, expected)


@moments
def test_the_operator_encodes_as_the_reference_and_is_well_formed(first):
    operator, x = (encode_first if first else encode_second), sample(first, (2, 5, 7))
    for got, expected in zip(operator(x, torch.tensor(4)), by_reference(x, 4, first), strict=False):
        assert torch.equal(got, expected)
    torch.library.opcheck(operator, (x.mT, torch.tensor(4)))


@moments
def test_moments_without_values_are_encoded_and_decoded_to_their_shapes(first):
    x, seed = torch.empty(2, 3, 5, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    codes, scale = (encode_first if first else encode_second)(x, seed)
    decoded = (decode_first if first else decode_second)(codes, scale)
    assert codes.is_meta
    assert (codes.shape, codes.dtype) == (x.shape, CODES[first].dtype)
    assert (scale.shape, scale.dtype) == ((2, 3), torch.float32)
    assert (decoded.shape, decoded.dtype) == (x.shape, torch.float32)


def specification(rank: int, *, first: bool) -> Spec:
    """The kernel as the launcher specialises it for rows in multiples of 16."""
    pointers = {"x_ptr": "*fp32", "codes_ptr": "*i8" if first else "*u8", "scale_ptr": "*fp32", "seed_ptr": "*i64"}
    tile = blocks(rank)
    constants = {"FIRST": first, "BLOCK_M": tile["BLOCK_M"], "BLOCK_R": tile["BLOCK_R"]}
    if rank == 1:
        constants["rank"] = 1
    return Spec(
        kernel="quantised_moments:encode_kernel",
        types=pointers | {"rows": "i32"} | ({} if rank == 1 else {"rank": "i32"}),
        constants=constants,
        aligned=[*pointers, "rows", *(["rank"] if rank % 16 == 0 else [])],
        options={"num_warps": tile["num_warps"]},
    )


@needs_triton
@pytest.mark.aot
def test_the_kernel_compiles_ahead_of_time_without_spills(target):
    compile_ahead(
        target,
        specification(1, first=False),
        specification(7, first=True),
        specification(module.MAX_RANK, first=True),
        specification(module.MAX_RANK, first=False),
    )
