"""Moments in a new frame: what may and what may not change when the frame does."""

from functools import partial

import pytest
import torch

from lightspan.optim.low_rank.bases import DCTBasis
from lightspan.optim.low_rank.carries import FrameChange, Gather, Keep, Rotate
from lightspan.optim.low_rank.inner import SGD, Adam, AdamSettings, InnerContext, largest_direction
from lightspan.optim.matrices.moments import BFloat16Moments, Float32Moments, Int8Moments
from lightspan.optim.matrices.stacks import Layout
from lightspan.optim.reference.ldadam import rotated_moments
from lightspan.subspaces.frames import random_frame

DOUBLE = {"dtype": torch.float64, "device": torch.device("cpu")}
BETAS = (0.9, 0.99)
SEED = torch.tensor(3)
STORAGE = Float32Moments()


def moments(batch, rows, rank, age=20.0, seed=0):
    """Raw moments whose corrected square is at least the corrected mean squared, as for any fixed sample."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(batch, rows, rank, generator=generator, dtype=torch.float64)
    square = mean.square() + torch.rand(batch, rows, rank, generator=generator, dtype=torch.float64)
    ages = torch.full((batch, rank), age, dtype=torch.float64)
    return {"exp_avg": mean * (1 - BETAS[0] ** age), "exp_avg_sq": square * (1 - BETAS[1] ** age), "age": ages}


def copied(state):
    return {key: value.clone() for key, value in state.items()}


def change_of_frame(old, new, coordinates):
    return FrameChange(lambda: old, lambda: new, {}, {}, coordinates, BETAS)


def rotated(before, old, new, coordinates, floor=True):
    after = copied(before)
    assert Rotate(floor).carry(after, change_of_frame(old, new, coordinates), STORAGE, SEED) is None
    return after


def gradient(batch=2, rows=9, rank=3, seed=1):
    return torch.randn(batch, rows, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("floor", [True, False])
def test_rotation_into_the_same_frame_changes_nothing(floor):
    frame, before = random_frame([0, 1], 6, 3, **DOUBLE), moments(2, 9, 3)
    after = rotated(before, frame, frame, gradient(), floor)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value)


def test_a_permutation_of_the_frame_permutes_moments_and_back_again_restores_them():
    frame, before = random_frame([0, 1], 6, 3, **DOUBLE), moments(2, 9, 3)
    flipped = frame[..., [2, 0, 1]] * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    there = rotated(before, frame, flipped, gradient())
    torch.testing.assert_close(there["exp_avg"][..., 1], -before["exp_avg"][..., 0])
    torch.testing.assert_close(there["exp_avg_sq"], before["exp_avg_sq"][..., [2, 0, 1]])
    back = rotated(there, flipped, frame, gradient())
    for key, value in before.items():
        torch.testing.assert_close(back[key], value)


def test_a_rotation_inside_the_span_leaves_the_lifted_mean_where_it_was():
    frame, before = random_frame([0, 1], 6, 3, **DOUBLE), moments(2, 9, 3)
    turned = frame @ random_frame([8, 9], 3, 3, **DOUBLE)
    after = rotated(before, frame, turned, gradient())
    torch.testing.assert_close(after["exp_avg"] @ turned.mT, before["exp_avg"] @ frame.mT)


def test_second_moments_stay_above_squared_means_so_that_steps_stay_below_one():
    old, new = (random_frame([s, s + 1], 6, 3, **DOUBLE) for s in (0, 5))
    after = rotated(moments(2, 9, 3), old, new, gradient())
    mean, square = after["exp_avg"] / (1 - 0.9**20), after["exp_avg_sq"] / (1 - 0.99**20)
    assert (square >= mean.square() * (1 - 1e-12)).all()


def test_a_direction_from_outside_the_old_span_starts_from_the_present_gradient():
    whole, coordinates = random_frame([0], 6, 6, **DOUBLE), gradient(1)
    after = rotated(moments(1, 9, 3), whole[..., :3], whole[..., 3:], coordinates)
    assert after["exp_avg"].abs().max() < 1e-12
    torch.testing.assert_close(after["exp_avg_sq"], coordinates.square() * (1 - 0.99**20))


def test_without_floor_it_is_the_published_formula_where_adam_could_have_come():
    old, new = (random_frame([s], 6, 3, **DOUBLE) for s in (0, 5))
    before = moments(1, 9, 3)
    after = rotated(before, old, new, gradient(1), floor=False)
    first, second = before["exp_avg"][0], before["exp_avg_sq"][0]
    overlap = old[0].T @ new[0]
    published, bounded = (rotated_moments(first, second, overlap, 20, BETAS, reach)[1] for reach in (False, True))
    assert torch.equal(published, bounded)
    torch.testing.assert_close(after["exp_avg_sq"][0], published)


def test_without_floor_a_second_moment_that_cancels_stays_within_adams_reach():
    overlap = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    first, second = torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.tensor([[0.96, 0.96]], dtype=torch.float64)
    corrected = {
        "exp_avg": first[None] * (1 - BETAS[0] ** 20),
        "exp_avg_sq": second[None] * (1 - BETAS[1] ** 20),
        "age": torch.full((1, 2), 20.0, dtype=torch.float64),
    }
    after = rotated(corrected, torch.eye(2, **DOUBLE)[None], overlap[None], torch.zeros(1, 1, 2), floor=False)
    of_first, of_second = corrected["exp_avg"][0], corrected["exp_avg_sq"][0]
    published, bounded = (rotated_moments(of_first, of_second, overlap, 20, BETAS, reach)[1] for reach in (False, True))
    assert (bounded > published).any()
    torch.testing.assert_close(after["exp_avg_sq"][0], bounded)


def test_momentum_alone_moves_linearly():
    old, new = (random_frame([s], 6, 3, **DOUBLE) for s in (0, 5))
    before = {"exp_avg": gradient(1)}
    torch.testing.assert_close(rotated(before, old, new, gradient(1))["exp_avg"], before["exp_avg"] @ old.mT @ new)


@pytest.mark.parametrize("storage", [BFloat16Moments(), Int8Moments()])
def test_rotation_works_on_stored_formats(storage):
    layout = Layout(9, 6, 3, False, torch.float32, torch.device("cpu"), (0, 1))
    exact = {key: value.float() for key, value in moments(2, 9, 3).items()}
    stored = {**storage.initial(layout, "exp_avg", 3), **storage.initial(layout, "exp_avg_sq", 3), "age": exact["age"]}
    for key in ("exp_avg", "exp_avg_sq"):
        storage.save(exact[key], stored, key, SEED)
    frames = [random_frame([s, s + 1], 6, 3, dtype=torch.float32, device=torch.device("cpu")) for s in (0, 5)]
    change = change_of_frame(*frames, gradient().float())
    Rotate().carry(stored, change, storage, SEED)
    Rotate().carry(exact, change, STORAGE, SEED)
    for key in ("exp_avg", "exp_avg_sq"):
        error = (storage.load(stored, key) - exact[key]).norm() / exact[key].norm()
        assert error < 0.03  # two roundings of bfloat16 or of 255 levels


def test_keep_leaves_everything():
    before = moments(1, 4, 3)
    after = copied(before)
    change = change_of_frame(*(random_frame([s], 6, 3, **DOUBLE) for s in (0, 1)), gradient(1, 4))
    assert Keep().carry(after, change, STORAGE, SEED) is None
    assert all(torch.equal(after[key], before[key]) for key in before)


def gathered(before, old, new, rows=4, own_age=True):
    after = copied(before)
    change = FrameChange(
        pytest.fail, pytest.fail, {"columns": torch.tensor([old])}, {"columns": torch.tensor([new])},
        torch.zeros(1, rows, len(old), dtype=torch.float64), BETAS,
    )  # fmt: skip
    return after, Gather(own_age).carry(after, change, STORAGE, SEED)


def test_a_gather_says_where_columns_stand_and_gives_new_ones_age_zero():
    before = moments(1, 4, 3)
    before["age"][:] = torch.tensor([5.0, 6.0, 7.0])
    after, source = gathered(before, [1, 4, 7], [4, 5, 7])
    assert source.tolist() == [[1, -1, 2]]
    assert after["age"].tolist() == [[6.0, 0.0, 7.0]]
    after, _ = gathered(before, [1, 4, 7], [4, 5, 7], own_age=False)
    assert after["age"].tolist() == [[5.0, 6.0, 7.0]]


@pytest.mark.parametrize("inner", [Adam(), SGD()])
def test_the_inner_rule_moves_moments_as_the_overlap_matrix_would(inner):
    layout = Layout(4, 8, 3, False, torch.float64, torch.device("cpu"), (0,))
    basis, before, old, new = DCTBasis(), moments(1, 4, 3), [0, 2, 5], [2, 3, 5]
    state = {key: before[key] for key in inner.initial(layout, STORAGE)}
    plain = copied(state)
    frames = [basis.frame({"columns": torch.tensor([c])}, layout) for c in (old, new)]
    overlap = frames[0].mT @ frames[1]
    plain["exp_avg"] = plain["exp_avg"] @ overlap
    if "exp_avg_sq" in plain:
        plain["exp_avg_sq"] = (plain["exp_avg_sq"] @ overlap).abs()
    _, source = gathered(before, old, new, own_age=False)
    numbers, g = AdamSettings(BETAS, 1e-8, SEED), gradient(1, 4)
    moved = inner.direction(g, state, InnerContext(layout, STORAGE, numbers, source))
    torch.testing.assert_close(moved, inner.direction(g, plain, InnerContext(layout, STORAGE, numbers)))
    for key in plain:
        torch.testing.assert_close(state[key], plain[key])


def test_a_column_that_comes_in_takes_no_oversized_first_step():
    """Under the age of the matrix it would be (1 - b1) / sqrt(1 - b2) = 3.2 times too long at (0.9, 0.999)."""
    layout = Layout(4, 8, 3, False, torch.float64, torch.device("cpu"), (0,))
    numbers = AdamSettings((0.9, 0.999), 1e-8, SEED)
    lengths = {}
    for own_age in (True, False):
        before = moments(1, 4, 3, age=5000.0)
        after, source = gathered(before, [0, 1, 2], [0, 1, 5], own_age=own_age)
        u = Adam().direction(
            torch.ones(1, 4, 3, dtype=torch.float64), after, InnerContext(layout, STORAGE, numbers, source)
        )
        lengths[own_age] = u[0, 0, 2].item()
    assert lengths[True] == pytest.approx(1.0, abs=1e-6)
    assert lengths[False] == pytest.approx(0.1 / 0.001**0.5, rel=0.01)


def test_a_rotation_leaves_no_mean_that_adam_could_not_have_reached():
    """Variances below zero can cancel squared means: as published, the next step would be one of m / eps."""
    betas, age = (0.9, 0.999), 50.0
    mean, square = torch.ones(1, 1, 2, dtype=torch.float64), torch.full((1, 1, 2), 0.02, dtype=torch.float64)
    ages = torch.full((1, 2), age, dtype=torch.float64)
    corrections = 1 - betas[0] ** age, 1 - betas[1] ** age
    before = {"exp_avg": mean * corrections[0], "exp_avg_sq": square * corrections[1], "age": ages}
    old = torch.eye(2, dtype=torch.float64)[None]
    for angle in torch.linspace(-1.5, 1.5, 601, dtype=torch.float64):
        new = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])[None]
        after = copied(before)
        Rotate(floor=False).carry(
            after, FrameChange(lambda: old, partial(torch.clone, new), {}, {}, mean, betas), STORAGE, SEED
        )
        reached = (after["exp_avg"] / corrections[0]).abs() / (after["exp_avg_sq"] / corrections[1]).sqrt()
        assert reached.max() <= largest_direction(betas) * (1 + 1e-9)


def test_what_adam_can_reach_at_most_is_reached_by_gradients_that_grow():
    """The worst case of Cauchy-Schwarz: g_k proportional to a_k / b_k, growing by b2 / b1 a step."""
    for betas in ((0.9, 0.999), (0.908, 0.99)):
        m, v = 0.0, 0.0
        for step in range(400):
            g = (betas[1] / betas[0]) ** -(400 - step)
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        assert abs(m / v**0.5 - largest_direction(betas)) < 1e-6
    assert largest_direction((0.9, 0.5)) == float("inf")
