"""Walsh-Hadamard transform: scipy's matrix, involution, gradients, kernel against reference, half types."""

import pytest
import torch
from ahead_of_time import Spec, compile_ahead
from kernel_inputs import needs_triton
from scipy.linalg import hadamard

from lightspan.core.errors import UserError
from lightspan.triton_kernels import walsh_hadamard as module
from lightspan.triton_kernels.walsh_hadamard import (
    KERNEL_BLOCK,
    blocks,
    hadamard_matrix,
    walsh_hadamard,
    walsh_hadamard_reference,
)

SIZES = [1, 2, 8, 32, 64, 128, 256, 1024, 2048]


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def butterfly(x):
    """The textbook algorithm in the dtype of x, which rounds log2(N) times."""
    size, half = x.shape[-1], 1
    while half < size:
        pairs = x.view(-1, size // (2 * half), 2, half)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2) * 0.5**0.5
        half *= 2
    return x.view(-1, size)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_product_with_scipys_matrix(size):
    x = normal(3, size)
    expected = x @ torch.tensor(hadamard(size), dtype=torch.float64) / size**0.5
    torch.testing.assert_close(walsh_hadamard(x), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(x @ hadamard_matrix(size, torch.float64, x.device), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(2**16,), (3, 2**17), (2**21,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_long_rows_are_done_in_pieces_with_one_rounding(shape, dtype):
    x = normal(*shape).to(dtype)
    before = x.clone()
    expected = butterfly(x.double()).view(shape).to(dtype)
    exact = dtype == torch.float64  # near zero, errors of the float32 in between show in bfloat16
    tolerance = {"atol": 1e-12, "rtol": 0} if exact else {"atol": 1e-5, "rtol": 8e-3}
    torch.testing.assert_close(walsh_hadamard(x), expected, **tolerance)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(2**17,), (2, 3, 16), (0, 8), (5, 2**16)])  # the last: several tiles of rows
def test_applied_twice_it_changes_nothing(shape):
    x = normal(*shape)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), x, atol=1e-12, rtol=0)


def test_lengths_are_kept_by_strided_inputs_and_the_input_is_left_alone():
    x = normal(16, 6).mT
    before = x.clone()
    torch.testing.assert_close(walsh_hadamard(x).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [0, 3, 12, 24])
def test_other_lengths_are_refused_with_a_way_out(size):
    with pytest.raises(UserError, match=f"length {size}: the length must be a power of two; pad it to"):
        walsh_hadamard(torch.zeros(2, size))


def test_gradients_of_first_and_second_order_are_right():
    x = normal(2, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: walsh_hadamard(x).square(), x)
    assert torch.autograd.gradgradcheck(lambda x: walsh_hadamard(x).pow(3), x)


def test_the_op_keeps_its_contract():
    torch.library.opcheck(walsh_hadamard, (normal(3, 64, dtype=torch.float32).requires_grad_(),))
    torch.library.opcheck(walsh_hadamard, (normal(64, 3, dtype=torch.bfloat16).mT[..., :32],))


@pytest.mark.parametrize("size", [2**k for k in range(31)])
def test_blocks_multiply_to_the_length_and_fit_the_dot(size):
    found = blocks(size, KERNEL_BLOCK)
    assert torch.tensor(found).prod() == size
    assert max(found) <= KERNEL_BLOCK
    assert max(found) <= 2 * min(found)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 1), (5, 2), (1, 16), (65, 8), (2, 64), (3, 256), (1, 2**13)])
def test_the_kernel_equals_the_reference(shape, dtype):
    x = normal(*reversed(shape), dtype=dtype).mT  # strided
    # Both sum in float32, in different orders; what they round to a half type may fall to either neighbour.
    tolerance = {"atol": 2e-6, "rtol": 0} if dtype == torch.float32 else {"atol": 1e-5, "rtol": torch.finfo(dtype).eps}
    got = module.walsh_hadamard_triton(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, walsh_hadamard_reference(x), **tolerance)


@pytest.mark.parametrize("transform", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_lose_less_than_twice_what_plain_torch_loses(transform, dtype):
    x = normal(4, 1024, dtype=dtype)
    truth = walsh_hadamard_reference(x.double())
    loss = (getattr(module, f"walsh_hadamard_{transform}")(x).double() - truth).abs().max()
    assert loss < 2 * (butterfly(x).double() - truth).abs().max()


def spec(source, out, inner, block):
    operand = "tl.float16" if source == "fp16" else "tl.bfloat16"
    return Spec(
        "walsh_hadamard:walsh_hadamard_kernel",
        types={"x_ptr": f"*{source}", "out_ptr": f"*{out}", "fibres": "i32", "scale": "fp32"},
        constants={"INNER": inner, "BLOCK": block, "OPERAND": operand, **module.tile(block)},
        aligned=["x_ptr", "out_ptr", "fibres"],
        tensor_cores=True,
    )


@needs_triton
@pytest.mark.aot
def test_the_kernel_compiles_for_gpus_without_spills(target):
    compile_ahead(
        target,
        spec("bf16", "fp32", 1, 64),  # 4096 = 64 * 64 in two passes
        spec("fp32", "bf16", 64, 64),
        spec("fp32", "fp32", 1, 64),
        spec("fp16", "fp16", 1, 8),
    )
