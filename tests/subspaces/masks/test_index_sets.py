"""Index sets that move keep an exact count; how counts are shared out over tensors; schedules."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightspan.core.errors import UserError
from lightspan.subspaces.masks.allocation import Allocation, AllTogether, ErdosRenyi, Uniform
from lightspan.subspaces.masks.index_sets import count_to_drop, drop_and_grow
from lightspan.subspaces.masks.schedules import Constant, Cubic, Exponential, Linear, Schedule, schedule_of
from lightspan.subspaces.masks.scores import GradientMagnitude, Magnitude, Movement, Sensitivity

VALUES = st.sampled_from([-1.0, 0.0, 0.0, 2.0, math.nan, -math.inf, math.inf])


@settings(derandomize=True, max_examples=80, deadline=None)
@given(data=st.data())
def test_the_count_is_exact_after_every_update_and_what_stays_scores_highest(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 10))
    opened = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    drop, grow = (torch.tensor(data.draw(st.lists(VALUES, min_size=size, max_size=size))) for _ in range(2))
    dropped, count = data.draw(st.integers(0, int(opened.sum()))), data.draw(st.integers(0, size))
    after = drop_and_grow(opened, drop, grow, dropped, count)
    assert after.sum() == count
    stays = min(int(opened.sum()) - dropped, count)
    worth = [-math.inf if math.isnan(score) else score for score in drop.tolist()]
    ranked = sorted(opened.nonzero().flatten().tolist(), key=lambda i: -worth[i])
    assert all(after[i] for i in ranked[:stays])


def test_a_coordinate_that_was_dropped_can_grow_again_and_then_never_left() -> None:
    opened = torch.tensor([True, True, False, False])
    after = drop_and_grow(opened, torch.tensor([1.0, 5, 9, 9]), torch.tensor([7.0, 0, 1, 2]), 1, 2)
    assert torch.equal(after, opened)


def test_with_alpha_zero_a_mask_stays_as_it_is() -> None:
    opened = torch.tensor([[True, False], [False, True]])
    n = count_to_drop(2, 0.0, 0.3)
    assert torch.equal(drop_and_grow(opened, torch.zeros(2, 2), torch.ones(2, 2), n, 2), opened)


def test_counts_to_drop_follow_the_cosine() -> None:
    assert [count_to_drop(100, 0.3, p) for p in (0.0, 0.5, 1.0, 2.0)] == [30, 15, 0, 0]
    assert count_to_drop(3, 0.3, 0.0) == 0


def test_shares_of_a_density() -> None:
    shapes = {"large": (100, 200), "small": (10, 20), "bias": (10,)}
    assert Uniform().counts(shapes, 0.1) == {"large": 2000, "small": 20, "bias": 1}
    counts = ErdosRenyi().counts(shapes, 0.1)
    assert counts["bias"] == 10
    assert counts["small"] / 200 > 5 * counts["large"] / 20_000
    assert abs(sum(counts.values()) - 2021) <= 2
    # Among tensors that are not full, the density is as (sum of axes) / (product of axes).
    assert counts["small"] / 30 == pytest.approx(counts["large"] / 300, rel=0.02)
    assert ErdosRenyi().counts(shapes, 1.0) == {"large": 20_000, "small": 200, "bias": 10}


@pytest.mark.parametrize("allocation", [Uniform(), ErdosRenyi(), AllTogether()])
def test_the_highest_scores_are_chosen(allocation: Allocation) -> None:
    scores = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(100.0, 104.0), "none": torch.zeros(0, 3)}
    chosen = allocation.choose(scores, 0.25)
    for name, mask in chosen.items():
        assert mask.shape == scores[name].shape
        below, above = scores[name][~mask], scores[name][mask]
        assert not len(below) or not len(above) or below.max() < above.min()
    if isinstance(allocation, AllTogether):
        assert chosen["b"].all()
        assert not chosen["a"].any()


@pytest.mark.parametrize(
    ("schedule", "half"),
    [
        (Linear(1.0, 0.2), 0.6),
        (Cubic(1.0, 0.2), 0.2 + 0.8 / 8),
        (Exponential(1.0, 0.01), 0.1),
        (Linear(1.0, 0.2, begin=0.25, until=0.75), 0.6),
        (Constant(0.7), 0.7),
    ],
)
def test_schedules_reach_both_ends_and_their_formula_in_between(schedule: Schedule, half: float) -> None:
    start, end = schedule.ends()
    assert schedule.at(0.0) == schedule.at(-1.0) == start
    assert schedule.at(1.0) == schedule.at(2.0) == pytest.approx(end)
    assert schedule.at(0.5) == pytest.approx(half)
    assert schedule_of(schedule) is schedule
    assert schedule_of(0.3) == Constant(0.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(1.0, math.nan), "Linear start=1.0 and end=nan must be finite"),
        (lambda: Cubic(1.0, 0.1, begin=0.5, until=0.5), "begin=0.5 and until=0.5 are shares of the time"),
        (lambda: Exponential(1.0, 0.0), "Exponential start=1.0 and end=0.0 must be above 0; use Linear to reach 0"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_scores_are_those_of_their_papers() -> None:
    w, g = torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 3.0])
    found = {type(s): s.of(w, g).tolist() for s in (Magnitude(), GradientMagnitude(), Sensitivity(), Movement())}
    assert found == {
        Magnitude: [2.0, 1.0],
        GradientMagnitude: [0.5, 3.0],
        Sensitivity: [1.0, 3.0],
        Movement: [1.0, -3.0],
    }
