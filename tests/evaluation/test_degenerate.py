"""Degenerate data are ordinary data: every estimator says what it makes of them, or what is wrong, in every dtype."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.dimension import likeliest_dimension, neighbour_ratios, two_nn_fit
from lightspan.evaluation.geometry.frechet import frechet_distance, principal_directions
from lightspan.evaluation.geometry.spectra import (
    effective_rank,
    energy_shares,
    leading_energy,
    participation_ratio,
    singular_values,
    stable_rank,
)
from lightspan.evaluation.probes.knn import knn_accuracy
from lightspan.evaluation.probes.linear_probe import fit_linear_probe, linear_probe_accuracy

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
MEASURES: list[Callable[[Tensor], Tensor]] = [effective_rank, participation_ratio, stable_rank]
ROWS, LABELS = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3


@DTYPE
@pytest.mark.parametrize("measure", MEASURES)
def test_rows_that_are_all_equal_span_no_dimension_about_their_mean(measure, dtype) -> None:
    for value in (0.0, 0.1, 1000.3):
        rows = torch.full((20, 5), value, dtype=dtype)
        assert measure(singular_values(rows, center=True)) == 0
        assert measure(singular_values(rows)) == pytest.approx(float(value > 0), rel=1e-5)


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_know_no_scale_down_to_the_smallest_and_up_to_the_largest_numbers(measure) -> None:
    values = singular_values(ROWS)
    for scale in (1e-37, 1e-30, 1e30, 1e37):
        assert measure(values * scale).item() == pytest.approx(measure(values).item(), rel=1e-4)
        torch.testing.assert_close(energy_shares(values * scale), energy_shares(values), rtol=1e-4, atol=1e-6)


@DTYPE
def test_measures_are_taken_in_float32_or_wider(dtype) -> None:
    rows = ROWS.to(dtype)
    values = singular_values(rows)
    for measure in MEASURES:
        assert measure(values.to(dtype)).dtype == torch.promote_types(dtype, torch.float32)


def test_matrices_without_rows_or_columns_use_no_dimension_and_nan_is_passed_on() -> None:
    for empty in (ROWS[:0], ROWS[:, :0]):
        for measure in MEASURES:
            assert measure(singular_values(empty, center=True)) == 0
            assert leading_energy(singular_values(empty), 2) == 0
    for bad in (math.nan, math.inf):
        rows = ROWS.clone()
        rows[3, 2] = bad
        assert all(measure(singular_values(rows, center=center)).isnan() for measure in MEASURES for center in (0, 1))


@DTYPE
def test_one_class_is_always_right_and_rows_without_a_difference_tell_nothing(dtype) -> None:
    rows, flat = ROWS.to(dtype), torch.full((20, 5), 0.3, dtype=dtype)
    share = (LABELS == 0).double().mean().item()
    for probe in (partial(knn_accuracy, k=1), linear_probe_accuracy):
        assert probe(rows, LABELS * 0, rows, LABELS * 0) == 1
        assert probe(rows[:1], LABELS[:1], rows[:1], LABELS[:1]) == 1
        for same in (flat, flat * 0):
            assert 0 <= probe(same, LABELS, same, LABELS) <= 0.5
    assert linear_probe_accuracy(flat, LABELS, flat, LABELS) == pytest.approx(share)  # the most frequent class


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e37])
def test_neighbours_know_no_scale_and_sides_may_differ_in_dtype(scale: float) -> None:
    expected = knn_accuracy(ROWS[:10], LABELS[:10], ROWS[10:], LABELS[10:], k=3)
    assert knn_accuracy(ROWS[:10] * scale, LABELS[:10], ROWS[10:], LABELS[10:], k=3) == expected
    assert knn_accuracy(ROWS[:10].bfloat16(), LABELS[:10], ROWS[10:] * scale, LABELS[10:], k=3) >= 0


@DTYPE
def test_equal_sets_of_equal_rows_are_at_distance_zero(dtype) -> None:
    flat = torch.full((20, 5), 0.3, dtype=dtype)
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-12)
    shift_D = (flat[0] + 1).double() - flat[0].double()
    assert frechet_distance(flat, flat[:2] + 1) == pytest.approx(shift_D.square().sum().item())
    mean_D, directions_DR = principal_directions(flat, 2)
    torch.testing.assert_close(mean_D, flat[0].double())
    torch.testing.assert_close(directions_DR.T @ directions_DR, torch.eye(2).double())


NAN = ROWS.clone()
NAN[4, 1] = math.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(ROWS, NAN), "NaN or infinite values, which have no moments"),
        (lambda: principal_directions(NAN, 2), "NaN or infinite values, which have no moments"),
        (lambda: linear_probe_accuracy(ROWS, LABELS, NAN, LABELS), "NaN or infinite values, so no linear probe"),
        (lambda: linear_probe_accuracy(ROWS, LABELS, ROWS[:0], LABELS[:0]), "got no test row"),
        (lambda: fit_linear_probe(ROWS[:0], LABELS[:0]), "at least one training row"),
        (lambda: fit_linear_probe(ROWS, LABELS - 1), "labels must be at least 0"),
        (lambda: knn_accuracy(NAN, LABELS, ROWS, LABELS), "NaN or infinite values, so they have no neighbours"),
        (lambda: two_nn_fit(ROWS[:, :0]), "got 1 different points of 20"),
        (lambda: likeliest_dimension(neighbour_ratios(ROWS[:0])), "got 0 different points of 0"),
        (lambda: likeliest_dimension(neighbour_ratios(ROWS[:2].repeat(10, 1))), "got 2 different points of 20"),
    ],
)
def test_what_cannot_be_estimated_is_told(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
