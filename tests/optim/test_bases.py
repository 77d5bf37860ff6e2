"""Bases: what a refresh keeps of a gradient, and what carrying moments into a new frame may and may not change."""

import pytest
import torch

from lightspan.optim.bases import DCTBasis, Moments, PowerBasis
from lightspan.subspaces.frames import random_frame

DOUBLE = {"dtype": torch.float64, "device": torch.device("cpu")}
BETAS = (0.9, 0.99)


def moments(batch, rows, rank, age=20.0, seed=0):
    """Raw moments whose corrected square is at least the corrected mean squared, as for any fixed sample."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(batch, rows, rank, generator=generator, dtype=torch.float64)
    square = mean.square() + torch.rand(batch, rows, rank, generator=generator, dtype=torch.float64)
    ages = torch.full((batch, rank), age, dtype=torch.float64)
    return Moments(mean * (1 - BETAS[0] ** age), square * (1 - BETAS[1] ** age), ages)


def gradient(batch=2, rows=9, size=6, seed=1):
    return torch.randn(batch, rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("basis", [PowerBasis(), DCTBasis()])
def test_carrying_into_the_same_frame_changes_nothing(basis):
    state = basis.refresh(gradient(), basis.initial(2, 6, 3, seed=0, **DOUBLE), first=True)
    before = moments(2, 9, 3)
    after = basis.carry(before, gradient()[..., :3], state, state, BETAS)
    torch.testing.assert_close(after.first_BMR, before.first_BMR)
    torch.testing.assert_close(after.second_BMR, before.second_BMR)
    assert torch.equal(after.age_BR, before.age_BR)


def test_a_permutation_of_the_frame_permutes_moments_and_back_again_restores_them():
    basis, frame = PowerBasis(), random_frame(2, 6, 3, seed=0, **DOUBLE)
    flipped = frame[..., [2, 0, 1]] * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    before = moments(2, 9, 3)
    there = basis.carry(before, gradient()[..., :3], {"frame": frame}, {"frame": flipped}, BETAS)
    torch.testing.assert_close(there.first_BMR[..., 1], -before.first_BMR[..., 0])
    torch.testing.assert_close(there.second_BMR, before.second_BMR[..., [2, 0, 1]])
    back = basis.carry(there, gradient()[..., :3], {"frame": flipped}, {"frame": frame}, BETAS)
    torch.testing.assert_close(back.first_BMR, before.first_BMR)
    torch.testing.assert_close(back.second_BMR, before.second_BMR)


def test_a_rotation_inside_the_span_leaves_the_lifted_mean_where_it_was():
    basis, frame = PowerBasis(), random_frame(2, 6, 3, seed=0, **DOUBLE)
    rotated = frame @ random_frame(2, 3, 3, seed=9, **DOUBLE)
    before = moments(2, 9, 3)
    after = basis.carry(before, gradient()[..., :3], {"frame": frame}, {"frame": rotated}, BETAS)
    torch.testing.assert_close(after.first_BMR @ rotated.mT, before.first_BMR @ frame.mT)


def test_second_moments_stay_above_squared_means_so_that_steps_stay_below_one():
    basis = PowerBasis()
    old, new = random_frame(2, 6, 3, seed=0, **DOUBLE), random_frame(2, 6, 3, seed=1, **DOUBLE)
    after = basis.carry(moments(2, 9, 3), gradient()[..., :3], {"frame": old}, {"frame": new}, BETAS)
    mean, square = after.first_BMR / (1 - 0.9**20), after.second_BMR / (1 - 0.99**20)
    assert (square >= mean.square() * (1 - 1e-12)).all()


def test_a_direction_from_outside_the_old_span_starts_from_the_present_gradient():
    basis, whole = PowerBasis(), random_frame(1, 6, 6, seed=0, **DOUBLE)
    coordinates = gradient(1)[..., :3]
    after = basis.carry(moments(1, 9, 3), coordinates, {"frame": whole[..., :3]}, {"frame": whole[..., 3:]}, BETAS)
    assert after.first_BMR.abs().max() < 1e-12
    torch.testing.assert_close(after.second_BMR, coordinates.square() * (1 - 0.99**20))


def test_column_selection_takes_the_most_energetic_columns():
    basis = DCTBasis()
    matrix = basis.matrix(6, torch.float64, torch.device("cpu"))
    spectrum = torch.tensor([0.1, 3.0, 0.2, 2.0, 0.3, 1.0], dtype=torch.float64)
    g = (torch.randn(1, 9, 6, dtype=torch.float64).sign() * spectrum) @ matrix.T
    state = basis.refresh(g, basis.initial(1, 6, 3, seed=0, **DOUBLE), first=True)
    assert state["columns"].tolist() == [[1, 3, 5]]
    captured = (g @ basis.frame(state, 6, torch.float64)).square().sum()
    torch.testing.assert_close(captured, 9 * spectrum[[1, 3, 5]].square().sum())


def test_selected_columns_that_stay_keep_moments_bit_for_bit_and_new_ones_start_at_age_zero():
    before = moments(1, 4, 3)
    before.age_BR[:] = torch.tensor([5.0, 6.0, 7.0])
    old, new = {"columns": torch.tensor([[1, 4, 7]])}, {"columns": torch.tensor([[4, 5, 7]])}
    after = DCTBasis().carry(before, gradient(1, 4)[..., :3], old, new, BETAS)
    assert torch.equal(
        after.first_BMR,
        torch.stack([before.first_BMR[..., 1], torch.zeros(1, 4, dtype=torch.float64), before.first_BMR[..., 2]], -1),
    )
    assert torch.equal(after.second_BMR[..., [0, 2]], before.second_BMR[..., [1, 2]])
    assert after.age_BR.tolist() == [[6.0, 0.0, 7.0]]


def test_the_gather_equals_the_overlap_matrix_it_stands_for():
    basis, before = DCTBasis(), moments(1, 4, 3)
    old, new = {"columns": torch.tensor([[0, 2, 5]])}, {"columns": torch.tensor([[2, 3, 5]])}
    overlap = basis.frame(old, 6, torch.float64).mT @ basis.frame(new, 6, torch.float64)
    after = basis.carry(before, gradient(1, 4)[..., :3], old, new, BETAS)
    torch.testing.assert_close(after.first_BMR, before.first_BMR @ overlap)
