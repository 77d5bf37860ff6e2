"""Stochastic rounding, by the reference's pool and by the kernels' Philox: neighbours, mean, exact values, seeds."""

import pytest
import torch
from ahead_of_time import Spec, compile_ahead
from kernel_inputs import needs_triton
from torch import Tensor

from lightspan.triton_kernels.rounding import (
    BLOCK,
    WINDOW,
    noise_pool,
    stochastic_round,
    stochastic_round_reference,
    stochastic_round_triton,
)


@pytest.fixture(params=[stochastic_round_reference, pytest.param(stochastic_round_triton, marks=needs_triton)])
def rounder(request):
    return request.param


def seed(number: int) -> Tensor:
    return torch.tensor(number)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_the_result_is_one_of_the_two_neighbours(rounder):
    x = normal(10_000) * torch.logspace(-30, 30, 10_000)
    bits = x.view(torch.int32)
    down = bits.bitwise_and(-65536).view(torch.float32)  # towards zero
    up = (bits.bitwise_and(-65536) + 65536).view(torch.float32)
    got = rounder(x, seed(1)).float()
    assert ((got == down) | (got == up)).all()
    assert (got == down).any()
    assert (got == up).any()


@pytest.mark.sample(1)
def test_every_element_is_right_on_average_over_seeds(rounder):
    x = normal(200)
    rounds = torch.stack([rounder(x, seed(number)).double() for number in range(400)])
    spread = x.abs() * 2**-7 / 2  # a bfloat16 unit is at most 2^-7 of x; half of it bounds the standard deviation
    assert ((rounds.mean(dim=0) - x).abs() <= 5 * spread / 400**0.5).all()


@pytest.mark.sample(3)
@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.9])
def test_the_share_rounded_up_is_the_fraction_cut_off(rounder, fraction):
    total = 200_000
    x = torch.full((total,), 1 + fraction * 2**-7)
    share = (rounder(x, seed(3)) > 1).double().mean().item()
    assert abs(share - fraction) < 5 * (fraction * (1 - fraction) / total) ** 0.5 + 2**-16


def test_values_of_bfloat16_stay_exact(rounder):
    x = normal(10_000).bfloat16()
    x[:3] = torch.tensor([0.0, -0.0, 1e-40])
    got = rounder(x.float(), seed(4))
    assert torch.equal(got.view(torch.int16), x.view(torch.int16))


def test_infinities_and_every_nan_stay_what_they_are(rounder):
    # The largest payload is the NaN of GPUs, the smallest a signalling one: noise would turn them to zero and infinity.
    payloads = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32)
    for number in range(20):
        assert rounder(payloads.view(torch.float32), seed(number)).isnan().all()
    infinite = torch.tensor([torch.inf, -torch.inf])
    assert torch.equal(rounder(infinite, seed(5)).float(), infinite)


def test_a_nan_does_not_change_the_numbers_beside_it(rounder):
    x = normal(100)
    expected = rounder(x, seed(6))
    x[50] = torch.nan
    got = rounder(x, seed(6))
    assert torch.equal(got[:50], expected[:50])
    assert torch.equal(got[51:], expected[51:])


def test_equal_seeds_give_equal_bits_and_other_seeds_others(rounder):
    x = normal(10_000)
    first = rounder(x, seed(7))
    assert torch.equal(first, rounder(x, seed(7)))
    for other in (8, -7, 2**40 + 7):
        assert not torch.equal(first, rounder(x, seed(other)))


def test_the_layout_of_the_input_does_not_matter(rounder):
    x = normal(30, 40)
    got = rounder(x.mT.contiguous().mT, seed(9))
    assert torch.equal(got, rounder(x, seed(9)))
    assert got.is_contiguous()


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3, 0), (1, 2049), (3, 5, 7, 1)])
def test_any_shape_is_rounded_to_its_end(rounder, shape):
    x = torch.full(shape, 1.0 + 2**-8)
    got = rounder(x, seed(11))
    assert got.shape == shape
    assert got.dtype == torch.bfloat16
    assert ((got == 1) | (got == 1 + 2**-7)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_are_rounded_as_the_float32_that_they_convert_to(rounder, dtype):
    x = normal(50).to(dtype)
    assert torch.equal(rounder(x, seed(12)), rounder(x.float(), seed(12)))


def test_windows_of_the_reference_do_not_repeat_each_other():
    first, second = stochastic_round(torch.full((2 * WINDOW,), 1.0 + 2**-8), seed(10)).chunk(2)
    assert (first != second).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_the_operator_rounds_as_the_reference_and_is_well_formed():
    x = normal(3, 5).mT
    assert torch.equal(stochastic_round(x, seed(13)), stochastic_round_reference(x, seed(13)))
    torch.library.opcheck(stochastic_round, (x, seed(13)))


def test_a_tensor_without_values_is_rounded_to_its_shape():
    got = stochastic_round(torch.empty(4, 5, device="meta"), torch.empty((), dtype=torch.int64, device="meta"))
    assert got.is_meta
    assert (got.shape, got.dtype) == ((4, 5), torch.bfloat16)


@needs_triton
@pytest.mark.aot
def test_the_kernel_compiles_ahead_of_time_without_spills(target):
    types = {"x_ptr": "*fp32", "out_ptr": "*bf16", "seed_ptr": "*i64", "total": "i32"}
    constants, options = {"BLOCK": BLOCK["BLOCK"]}, {"num_warps": BLOCK["num_warps"]}
    kernel, pointers = "rounding:stochastic_round_kernel", ["x_ptr", "out_ptr", "seed_ptr"]
    compile_ahead(
        target,
        Spec(kernel, types, constants, aligned=[*pointers, "total"], options=options),
        Spec(kernel, types | {"total": "i64"}, constants, aligned=pointers, options=options),
    )


def test_the_pool_holds_every_integer_equally_often():
    counts = torch.bincount(noise_pool(torch.device("cpu")), minlength=2**16)
    assert (counts == 2 * WINDOW // 2**16).all()
