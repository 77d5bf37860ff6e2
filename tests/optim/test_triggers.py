"""When frames are chosen anew: by the clock, spread over matrices, or by the energy they still capture."""

import pytest
import torch
from torch import nn

from lightspan.errors import UserError
from lightspan.optim.low_rank import LowRank
from lightspan.optim.triggers import Every, WhenCapturedFalls


def test_by_the_clock_every_matrix_is_due_once_in_the_gap_and_not_all_at_once():
    trigger, phases = Every(5), [i / 10 for i in range(10)]
    due = [trigger.due(range(10), [step] * 10, phases, {}) for step in range(1, 21)]
    assert all(len(d) == 2 for d in due[4:])
    assert sorted(i for d in due[4:9] for i in d) == list(range(10))


def low_rank_gradients(subspace_seed, noise_seed):
    basis = torch.linalg.qr(torch.randn(10, 2, generator=torch.Generator().manual_seed(subspace_seed))).Q
    return torch.randn(16, 2, generator=torch.Generator().manual_seed(noise_seed)) @ basis.T


def refreshes(subspaces):
    """Steps in which the frame changed, for gradients from a sequence of subspaces."""
    weight = nn.Parameter(torch.zeros(16, 10))
    trigger = WhenCapturedFalls(below=0.7, check=2, at_most=1000)
    optimizer = LowRank([weight], lr=0.0, rank=3, refresh=trigger)
    steps, before = [], None
    for step, subspace in enumerate(subspaces):
        weight.grad = low_rank_gradients(subspace, step)
        optimizer.step()
        now = optimizer.state[weight]["frame"].clone()
        if before is not None and not torch.equal(before, now):
            steps.append(step)
        before = now
    return steps, optimizer.state[weight]


def test_without_turns_all_frames_change_in_the_same_step():
    trigger, phases = Every(5, staggered=False), [i / 10 for i in range(10)]
    asked = {step: trigger.due(range(10), [step] * 10, phases, {}) for step in range(1, 11)}
    assert asked == {step: list(range(10)) if step % 5 == 0 else [] for step in range(1, 11)}


def test_a_frame_that_keeps_capturing_lives_on_and_one_that_fails_is_replaced():
    steps, _ = refreshes([0] * 40)
    assert steps == []
    steps, state = refreshes([0] * 20 + [1] * 20)
    assert steps
    assert min(steps) > 20
    assert state["captured"] > 0.9


def test_a_frame_is_replaced_at_its_greatest_age_whatever_it_captures():
    weight = nn.Parameter(torch.zeros(16, 10))
    optimizer = LowRank([weight], rank=3, refresh=WhenCapturedFalls(check=2, at_most=6))
    ages = []
    for step in range(20):
        weight.grad = low_rank_gradients(0, step)
        optimizer.step()
        ages.append(int(optimizer.state[weight]["frame_age"]))
    assert max(ages) <= 7
    assert ages.count(1) >= 3


def test_the_schedule_survives_saving():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.zeros(16, 10)) for _ in range(2)]
    optimizers = [LowRank([w], lr=0.1, rank=3, refresh=WhenCapturedFalls(check=2)) for w in weights]
    for step in range(30):
        if step == 13:
            weights[1].data.copy_(weights[0].data)
            optimizers[1].load_state_dict(optimizers[0].state_dict())
        for i in (0,) if step < 13 else (0, 1):
            weights[i].grad = low_rank_gradients(step // 9, step)
            optimizers[i].step()
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Every(0), "refresh=0 must be at least 1 step"),
        (lambda: WhenCapturedFalls(below=1.0), r"below=1.0 must be in \(0, 1\)"),
        (lambda: WhenCapturedFalls(check=9, at_most=5), "check=9, at_most=5"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
