"""Fast transforms: orthonormality, scipy, dense against fast forms, adjoints, the factors of any size."""

import pytest
import scipy.fft
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard

from lightspan.errors import UserError
from lightspan.experiments.transforms import (
    dct,
    hadamard_factors,
    hadamard_matrix,
    idct,
    kronecker_dct_factors,
    kronecker_matrix,
    kronecker_transform,
    two_factors,
)
from lightspan.subspaces.frames import dct_matrix

CPU = torch.device("cpu")
SIZES = [1, 2, 6, 7, 12, 13, 48, 64, 257]
FACTORS = [kronecker_dct_factors, hadamard_factors]


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(size=st.integers(1, 70))
def test_the_dct_is_scipys_for_every_length(size):
    x = normal(3, size)
    torch.testing.assert_close(dct(x), torch.tensor(scipy.fft.dct(x.numpy(), norm="ortho")), atol=1e-13, rtol=0)
    torch.testing.assert_close(idct(x), torch.tensor(scipy.fft.idct(x.numpy(), norm="ortho")), atol=1e-13, rtol=0)


@pytest.mark.parametrize("size", [*SIZES, 4096])
def test_the_fast_dct_is_the_product_with_its_matrix(size):
    x = normal(2, size)
    matrix = dct_matrix(size, dtype=torch.float64, device=CPU)
    torch.testing.assert_close(dct(x), x @ matrix, atol=1e-12, rtol=0)
    torch.testing.assert_close(idct(x), x @ matrix.mT, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_idct_inverts_dct_and_is_its_adjoint(size):
    x, y = normal(2, size), normal(2, size, seed=1)
    torch.testing.assert_close(idct(dct(x)), x, atol=1e-13, rtol=0)
    torch.testing.assert_close((dct(x) * y).sum(), (x * idct(y)).sum(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("transform", [dct, idct])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_gradients_flow_through_the_dct(transform, size):
    assert torch.autograd.gradcheck(transform, normal(2, size).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_lose_their_own_rounding_only(dtype):
    x = normal(4, 257, dtype=dtype)
    for transform in (dct, idct):
        y, truth = transform(x), transform(x.double())
        assert y.dtype == dtype
        # One rounding of each result, and the float32 error of the FFT, which is some 1e-7 of the rows' length.
        torch.testing.assert_close(y.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-7 * 257**0.5)


def test_strided_input_along_other_axes_is_read_right():
    x = normal(6, 5, 4).transpose(0, 2)
    torch.testing.assert_close(dct(x), dct(x.contiguous()), atol=0, rtol=0)


def test_a_dct_of_nothing_is_refused():
    with pytest.raises(UserError, match="length 0"):
        dct(torch.zeros(3, 0))


@given(size=st.integers(1, 5000))
def test_two_factors_are_the_most_balanced(size):
    left, right = two_factors(size)
    assert left * right == size
    assert left <= right
    assert not [a for a in range(left + 1, int(size**0.5) + 1) if size % a == 0]


@pytest.mark.parametrize(("size", "factors"), [(4096, (64, 64)), (768, (24, 32)), (257, (1, 257)), (12, (3, 4))])
def test_two_factors_of_usual_widths(size, factors):
    assert two_factors(size) == factors


@pytest.mark.parametrize("family", [two_factors, lambda size: hadamard_factors(size, torch.float32, CPU)])
def test_a_size_below_one_is_refused(family):
    with pytest.raises(UserError, match="size 0"):
        family(0)


@pytest.mark.parametrize("family", FACTORS)
@pytest.mark.parametrize("size", SIZES)
def test_every_basis_is_orthonormal(family, size):
    matrix = kronecker_matrix(*family(size, torch.float64, CPU))
    assert matrix.shape == (size, size)
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", FACTORS)
@pytest.mark.parametrize("size", SIZES)
def test_two_factors_do_what_the_dense_matrix_does(family, size):
    left, right = family(size, torch.float64, CPU)
    x, y, matrix = normal(3, 2, size), normal(3, 2, size, seed=1), kronecker_matrix(left, right)
    torch.testing.assert_close(kronecker_transform(x, left, right), x @ matrix, atol=1e-12, rtol=0)
    torch.testing.assert_close(kronecker_transform(x, left.mT, right.mT), x @ matrix.mT, atol=1e-12, rtol=0)
    back = kronecker_transform(kronecker_transform(x, left, right), left.mT, right.mT)
    torch.testing.assert_close(back, x, atol=1e-12, rtol=0)
    inner = (kronecker_transform(x, left, right) * y).sum(), (x * kronecker_transform(y, left.mT, right.mT)).sum()
    torch.testing.assert_close(*inner, atol=1e-11, rtol=0)


def test_columns_are_kronecker_products_of_the_factors_columns():
    left, right = normal(3, 3), normal(4, 4, seed=1)
    expected = torch.kron(left[:, 2], right[:, 1])
    assert torch.equal(kronecker_matrix(left, right)[:, 2 * 4 + 1], expected)


@pytest.mark.parametrize("size", [1, 2, 4, 64, 256])
def test_the_hadamard_family_of_a_power_of_two_is_the_hadamard_matrix(size):
    matrix = kronecker_matrix(*hadamard_factors(size, torch.float64, CPU))
    expected = torch.tensor(hadamard(size), dtype=torch.float64) / size**0.5
    torch.testing.assert_close(matrix, expected, atol=1e-14, rtol=0)
    torch.testing.assert_close(hadamard_matrix(size, torch.float64, CPU), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("size", [3, 6, 24, 40])
def test_the_hadamard_family_of_other_sizes_is_hadamard_times_the_dct_of_the_odd_part(size):
    power = size & -size
    expected = torch.kron(
        hadamard_matrix(power, torch.float64, CPU), dct_matrix(size // power, dtype=torch.float64, device=CPU)
    )
    torch.testing.assert_close(
        kronecker_matrix(*hadamard_factors(size, torch.float64, CPU)), expected, atol=1e-14, rtol=0
    )


@pytest.mark.parametrize(
    ("size", "sides"), [(4096, (64, 64)), (768, (32, 24)), (12288, (128, 96)), (11008, (128, 86)), (2048, (32, 64))]
)
def test_hadamard_factors_of_usual_widths_are_balanced(size, sides):
    assert tuple(map(len, hadamard_factors(size, torch.float32, CPU))) == sides


def test_hadamard_matrices_of_other_sizes_are_refused():
    with pytest.raises(UserError, match="length 12: the length must be a power of two; pad it to 16"):
        hadamard_matrix(12, torch.float32, CPU)
