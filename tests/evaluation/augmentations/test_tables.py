"""The Hilbert space of an augmentation on the hypercube, by enumeration and by closed forms."""

import math

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.evaluation.augmentations.tables import (
    AugmentationTable,
    block_complexity,
    block_masked_cube,
    cube,
    masked_complexity,
    masked_cube,
    masked_spectrum,
)

SIDE = 4


def uniform(count: int) -> torch.Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_complexities_are_those_of_the_closed_forms(rate: float) -> None:
    assert masked_cube(SIDE, rate).complexity() == pytest.approx((2 - rate) ** SIDE, rel=1e-9)
    assert masked_cube(SIDE, rate).complexity() == pytest.approx(masked_complexity(SIDE, rate), rel=1e-9)
    assert masked_cube(SIDE, rate, 0.1).complexity() == pytest.approx(masked_complexity(SIDE, rate, 0.1), rel=1e-9)
    assert block_masked_cube(SIDE, rate).complexity() == pytest.approx(block_complexity(SIDE, rate), rel=1e-9)
    assert masked_complexity(6, rate) == pytest.approx({0.2: 34.012, 0.5: 11.391, 0.8: 2.986}[rate], abs=1e-3)


def test_blocks_are_less_complex_than_random_masks_of_as_much() -> None:
    for ratio in (0.25, 0.5, 0.75):
        assert block_complexity(SIDE, ratio) < masked_complexity(SIDE, ratio)


def test_both_kernels_have_the_spectrum_of_parities() -> None:
    table = masked_cube(SIDE, 0.3)
    said = torch.tensor(masked_spectrum(SIDE, 0.3), dtype=torch.float64)
    torch.testing.assert_close(table.spectrum(), said, atol=1e-12, rtol=0)
    root_A = table.p_A.sqrt()
    other = torch.linalg.eigvalsh(root_A[:, None] * table.augmented_kernel() * root_A).flip(0)
    torch.testing.assert_close(other[: len(said)], said, atol=1e-12, rtol=0)
    assert other[len(said) :].abs().max() < 1e-12


def test_eigenfunctions_are_orthonormal_and_span_parities_the_constant_first() -> None:
    table = masked_cube(SIDE, 0.3)
    values, functions = table.eigenfunctions(1 + SIDE)
    torch.testing.assert_close(functions.T @ functions / 2**SIDE, torch.eye(1 + SIDE, dtype=torch.float64))
    torch.testing.assert_close(functions[:, 0].abs(), torch.ones(2**SIDE, dtype=torch.float64))
    parities = cube(SIDE)
    inside = functions @ (functions.T @ parities) / 2**SIDE
    torch.testing.assert_close(inside, parities)
    assert values.tolist() == pytest.approx([1, *[0.7] * SIDE])


def test_the_identity_tells_all_atoms_apart_and_a_constant_none() -> None:
    identity = AugmentationTable(torch.eye(7, dtype=torch.float64), uniform(7))
    assert identity.complexity() == pytest.approx(7)
    constant = AugmentationTable(torch.ones(7, 1, dtype=torch.float64), uniform(7))
    assert constant.complexity() == pytest.approx(1)
    assert constant.spectrum()[1:].abs().max() < 1e-12
    with pytest.raises(UserError, match="count=2"):
        constant.eigenfunctions(2)


def test_samples_limit_a_complexity_and_functions_reach_beyond_them() -> None:
    table = masked_cube(6, 0.02)
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:20]
    few = table.of_samples(rows)
    assert 19 < few.complexity() <= 20 < table.complexity()
    strong = masked_cube(6, 0.8).of_samples(rows)
    values, functions = strong.eigenfunctions(3)
    assert functions.isfinite().all()
    assert len(functions) == 64
    for i in range(3):  # the eigenvalue equation on the samples, whose number of repeats is 1
        torch.testing.assert_close(
            strong.kernel()[rows][:, rows] @ functions[rows, i] / 20, values[i] * functions[rows, i]
        )


def test_the_best_encoder_has_the_sum_of_eigenvalues_as_its_trace_whatever_its_basis() -> None:
    table = masked_cube(SIDE, 0.4)
    root_A = table.p_A.sqrt()
    _, vectors = torch.linalg.eigh(root_A[:, None] * table.augmented_kernel() * root_A)
    best = vectors.flip(1)[:, 1 : 1 + SIDE] / root_A[:, None]
    assert table.trace_of(best) == pytest.approx(SIDE * 0.6)
    mixed = best @ torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    assert table.trace_of(mixed) == pytest.approx(SIDE * 0.6)
    assert table.trace_of(best[:, :2]) == pytest.approx(2 * 0.6)
    dead = torch.cat([best, torch.zeros(len(best), 1, dtype=torch.float64)], dim=1)
    assert table.trace_of(dead) == pytest.approx(SIDE * 0.6)
    noise = torch.randn(len(best), SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert table.trace_of(noise) < SIDE * 0.6


def test_what_is_no_probability_or_too_large_is_refused() -> None:
    with pytest.raises(UserError, match="given_NA"):
        AugmentationTable(torch.ones(2, 2, dtype=torch.float64), uniform(2))
    with pytest.raises(UserError, match="p_N"):
        AugmentationTable(torch.eye(2, dtype=torch.float64), torch.tensor([1.5, -0.5], dtype=torch.float64))
    with pytest.raises(UserError, match="dimensions"):
        masked_cube(40, 0.5)
    with pytest.raises(UserError, match="rate"):
        masked_cube(2, math.nan)
