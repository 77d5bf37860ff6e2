"""Frames: orthonormality, adjointness, optimal capture, against scipy and torch.linalg."""

import pytest
import torch
from scipy.fft import dct

from lightspan.subspaces.frames import (
    Frames,
    block_power_step,
    cholesky_qr2,
    dct_matrix,
    gram,
    random_frame,
    top_columns,
)

DOUBLE = {"dtype": torch.float64, "device": torch.device("cpu")}
SINGLE = {"dtype": torch.float32, "device": torch.device("cpu")}


def orthonormality_error(q_BNR):
    return (q_BNR.mT @ q_BNR - torch.eye(q_BNR.shape[-1], dtype=q_BNR.dtype)).abs().max().item()


def low_rank_gradient(rows, size, rank, seed=0, noise=0.0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(2, rows, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(2, rank, size, generator=generator, dtype=torch.float64)
    return left @ right + noise * torch.randn(2, rows, size, generator=generator, dtype=torch.float64)


def test_a_random_frame_depends_on_its_seed_alone():
    a, again, other = (random_frame([seed, 9], 7, 3, **SINGLE) for seed in (5, 5, 6))
    assert torch.equal(a, again)
    assert not torch.equal(a, other)
    assert orthonormality_error(a) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cholesky_qr2_spans_what_it_was_given(dtype):
    y = torch.randn(3, 40, 8, dtype=dtype, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        0, 5, 8, dtype=dtype
    )
    q = cholesky_qr2(y, random_frame([1, 2, 3], 40, 8, dtype=dtype, device=y.device))
    assert orthonormality_error(q) < 20 * torch.finfo(dtype).eps
    outside = y - q @ (q.mT @ y)
    nudge = 1e-3 if dtype == torch.float32 else 1e-5
    assert (outside.norm(dim=1) / y.norm(dim=1)).max() < nudge


def test_dependent_and_zero_columns_are_completed_to_a_frame_that_keeps_their_span():
    y = torch.randn(1, 30, 6, generator=torch.Generator().manual_seed(0))
    y[..., 3], y[..., 4] = y[..., 0], 0.0
    q = cholesky_qr2(y, random_frame([1], 30, 6, **SINGLE))
    assert orthonormality_error(q) < 1e-5
    assert ((y - q @ (q.mT @ y)).norm() / y.norm()) < 1e-3


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_matrix_without_direction_keeps_its_anchor_and_leaves_its_neighbours_alone(value):
    anchor = random_frame([1, 2], 12, 4, **SINGLE)
    y = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    alone = cholesky_qr2(y, anchor)
    y[0] = value
    q = cholesky_qr2(y, anchor)
    torch.testing.assert_close(q[0], anchor[0])
    assert torch.equal(q[1], alone[1])


def test_power_steps_find_the_top_singular_subspace():
    gradient = low_rank_gradient(50, 30, 5, noise=0.01)
    frame = random_frame([2, 3], 30, 5, **DOUBLE)
    for _ in range(4):
        frame = block_power_step(list(gradient), frame)
    best = torch.linalg.svdvals(gradient)[:, :5].square().sum(dim=1)
    captured = Frames(frame).pull(gradient).square().sum(dim=(1, 2))
    assert (captured / best > 1 - 1e-8).all()


def test_a_warm_step_on_a_rank_deficient_gradient_holds_all_of_its_energy():
    gradient = low_rank_gradient(20, 16, 3).float()
    frame = block_power_step(list(gradient), random_frame([2, 3], 16, 8, **SINGLE))
    assert orthonormality_error(frame) < 1e-5
    kept = Frames(frame).pull(gradient).square().sum(dim=(1, 2)) / gradient.square().sum(dim=(1, 2))
    assert (kept > 1 - 1e-5).all()


@pytest.mark.parametrize("size", [1, 2, 7, 8, 13, 257])
def test_dct_matrix_is_scipys_orthonormal_dct(size):
    x = torch.randn(4, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    expected = torch.from_numpy(dct(x.numpy(), norm="ortho"))
    torch.testing.assert_close(x @ dct_matrix(size, **DOUBLE), expected, atol=1e-12, rtol=0)


def test_a_wide_dct_matrix_is_orthonormal_in_float32():
    matrix = dct_matrix(2048, **SINGLE)
    assert orthonormality_error(matrix[None]) < 5e-6


def test_top_columns_are_the_best_subset_sorted():
    energy = torch.tensor([[3.0, 1.0, 2.0, 5.0], [0.0, 1.0, 1.5, 0.5]])
    assert top_columns(energy, 2).tolist() == [[0, 3], [1, 2]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gram_matrix_is_the_product_in_float64_and_symmetric(dtype):
    y_BNR = torch.randn(2, 70, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = gram(y_BNR)
    expected = torch.einsum("bnr,bns->brs", y_BNR.double(), y_BNR.double())
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-12)
    assert torch.equal(got, got.mT)
