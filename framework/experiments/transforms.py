"""Fast orthonormal transforms: the DCT by one FFT, and fixed bases that are a Kronecker product of two small factors.

A Kronecker basis D = A (x) B of size N = a * b has the column A[:, i_a] (x) B[:, i_b] at j = i_a * b + i_b, and
x @ D = (A^T X B).flatten() for x seen as a matrix X [a b]: a + b products per number instead of N.
Kernels for both kinds are in triton_kernels; `dct` and its derivation come from dct_energies.py there.

Shapes: a, b sizes of the factors; left_aa = A, right_bb = B.
"""

import torch
from torch import Tensor

from lightspan.devices import wide
from lightspan.errors import UserError
from lightspan.subspaces.frames import dct_matrix
from lightspan.triton_kernels.dct_energies import dct as dct
from lightspan.triton_kernels.dct_energies import rotation
from lightspan.triton_kernels.dct_energies import two_factors as two_factors
from lightspan.triton_kernels.walsh_hadamard import hadamard_matrix as hadamard_matrix


def idct(y: Tensor) -> Tensor:
    """Inverse and adjoint of `dct`: the orthonormal DCT-III along the last axis."""
    size, wide_y = y.shape[-1], wide(y)
    half = size // 2 + 1
    # `dct` computes y from: s_k exp(-i pi k / 2N) FFT(v)_k = y_k - i y_(N-k), where y_N counts as 0.
    mirrored = torch.nn.functional.pad(wide_y[..., 1:].flip(-1), (1, 0))[..., :half]
    v = torch.fft.irfft(torch.complex(wide_y[..., :half], -mirrored) / rotation(size, wide_y), n=size)
    evens = (size + 1) // 2
    x = torch.empty_like(wide_y)
    x[..., ::2], x[..., 1::2] = v[..., :evens], v[..., evens:].flip(-1)
    return x.to(y.dtype)


def kronecker_dct_factors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(A, B) with DCT-II bases of both `two_factors(size)`; the DCT itself for a prime size."""
    left, right = two_factors(size)
    return dct_matrix(left, dtype=dtype, device=device), dct_matrix(right, dtype=dtype, device=device)


def hadamard_factors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(A, B) whose Kronecker product is H_(2^k) (x) DCT_odd, for any size = 2^k * odd, split as evenly as possible.

    H_(2^k) is itself a Kronecker product, so A = H_(2^i) and B = H_(2^(k - i)) (x) DCT_odd are the same basis for every
    i. A power of two gives the Hadamard matrix of that size; an odd size has no Hadamard part and gives the plain DCT.
    """
    if size < 1:
        raise UserError(f"size {size}: a basis needs at least one column")
    power = size & -size
    odd = size // power
    left = min((1 << i for i in range(power.bit_length())), key=lambda a: (max(a, size // a), a))
    cpu = torch.device("cpu")  # not every device has float64
    right_bb = torch.kron(
        hadamard_matrix(power // left, torch.float64, cpu), dct_matrix(odd, dtype=torch.float64, device=cpu)
    )
    return hadamard_matrix(left, dtype, device), right_bb.to(dtype=dtype, device=device)


def kronecker_matrix(left_aa: Tensor, right_bb: Tensor) -> Tensor:
    """The dense basis D [N N]; column i_a * b + i_b is A[:, i_a] (x) B[:, i_b]."""
    return torch.kron(left_aa.contiguous(), right_bb.contiguous())


def kronecker_transform(x: Tensor, left_aa: Tensor, right_bb: Tensor) -> Tensor:
    """x @ D along the last axis, by the two factors."""
    matrix_ab = x.unflatten(-1, (len(left_aa), len(right_bb)))
    return (left_aa.mT @ matrix_ab @ right_bb).flatten(-2)
