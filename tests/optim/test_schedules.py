"""Schedules: rates worked by hand, ratios between groups, resume, ranges."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightspan.core.errors import UserError
from lightspan.optim.schedules import (
    Staircase,
    TeacherMomentum,
    TeacherTemperature,
    WarmupCosine,
    WarmupCosineDecay,
    WarmupLine,
    line_between,
    restarting_schedule,
)


def parameter(size=2):
    return nn.Parameter(torch.zeros(size, size))


def rates(scheduler, optimizer, steps):
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


def test_warmup_rises_in_equal_steps_to_the_peak_and_the_cosine_ends_at_the_floor():
    optimizer = torch.optim.SGD([parameter()], lr=2.0)
    got = rates(WarmupCosine(optimizer, total_steps=100, warmup=0.1, final=0.1), optimizer, 102)
    assert got[:11] == pytest.approx([2.0 * (s + 1) / 11 for s in range(11)])
    assert got[55] == pytest.approx(2.0 * 0.55)
    assert got[100:] == pytest.approx([0.2, 0.2])
    assert all(a > b for a, b in pairwise(got[10:100]))


def test_a_line_falls_in_equal_steps_from_the_peak_to_the_floor():
    optimizer = torch.optim.SGD([parameter()], lr=2.0)
    got = rates(WarmupLine(optimizer, total_steps=100, warmup=0.1, final=0.1), optimizer, 102)
    assert got[:11] == pytest.approx([2.0 * (s + 1) / 11 for s in range(11)])
    assert got[10:101] == pytest.approx([2.0 - 1.8 * s / 90 for s in range(91)])
    assert got[101] == pytest.approx(0.2)
    optimizer = torch.optim.SGD([parameter()], lr=2.0)
    assert rates(WarmupLine(optimizer, 4, warmup=0.0), optimizer, 5) == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    with pytest.raises(UserError, match="warmup=1 is a share"):
        WarmupLine(optimizer, 4, warmup=1)


def test_a_run_that_covers_half_of_the_cosine_is_the_first_half_of_one_twice_as_long():
    optimizer = torch.optim.SGD([parameter()], lr=2.0)
    half = rates(WarmupCosine(optimizer, total_steps=50, warmup=0.0, final=0.1, covered=0.5), optimizer, 52)
    optimizer = torch.optim.SGD([parameter()], lr=2.0)
    assert half[:51] == pytest.approx(rates(WarmupCosine(optimizer, 100, warmup=0.0, final=0.1), optimizer, 51))
    assert half[50:] == pytest.approx([1.1, 1.1])  # stays where it stopped


def test_a_run_that_covers_several_half_cosines_is_torchs_cosine_beyond_its_end():
    own, torchs = (torch.optim.SGD([parameter()], lr=2.0) for _ in range(2))
    found = rates(WarmupCosine(own, total_steps=60, warmup=0.0, final=0.1, covered=6.0), own, 61)
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(torchs, T_max=10, eta_min=0.2)
    assert found == pytest.approx(rates(expected, torchs, 61))


def test_warm_up_starts_from_its_first_share():
    optimizer = torch.optim.SGD([parameter()], lr=2.0)
    schedule = WarmupCosine(optimizer, 10, warmup=0.4, final=0.0, first=0.5)
    assert rates(schedule, optimizer, 5) == pytest.approx([1.2, 1.4, 1.6, 1.8, 2.0])


def test_groups_keep_the_ratio_of_their_rates_throughout():
    optimizer = torch.optim.SGD([{"params": [parameter()], "lr": 1.0}, {"params": [parameter()], "lr": 0.25}], lr=1.0)
    scheduler = WarmupCosine(optimizer, total_steps=20)
    for _ in range(20):
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[1]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"] / 4)


def test_a_schedule_loaded_halfway_goes_on_as_if_it_had_never_stopped():
    def make():
        optimizer = torch.optim.SGD([parameter()], lr=1.0)
        return optimizer, WarmupCosine(optimizer, total_steps=20)

    optimizer, scheduler = make()
    straight = rates(scheduler, optimizer, 20)
    first, early = make()
    rates(early, first, 7)
    second, late = make()
    second.load_state_dict(first.state_dict())
    late.load_state_dict(early.state_dict())
    assert rates(late, second, 13) == straight[7:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps=0"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"final": 2.0}, "final=2.0"),
        ({"first": -0.1}, "first=-0.1"),
        ({"covered": 0.0}, "covered=0.0"),
        ({"covered": math.inf}, "covered=inf"),
    ],
)
def test_schedules_refuse_what_lies_outside_their_ranges(options, message):
    with pytest.raises(UserError, match=message):
        WarmupCosine(torch.optim.SGD([parameter()], lr=1.0), **{"total_steps": 10, **options})


def test_weight_decay_follows_a_half_cosine_to_its_factor_and_groups_without_it_keep_none():
    groups = [{"params": [parameter()]}, {"params": [parameter()], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=0.04)
    scheduler, plain = (
        WarmupCosineDecay(optimizer, 20, decay_factor=10.0),
        WarmupCosine(torch.optim.SGD([parameter()], 1.0), 20),
    )
    decays, rates_ = [], []
    for step in range(23):
        decays.append(optimizer.param_groups[0]["weight_decay"])
        rates_.append((optimizer.param_groups[0]["lr"], plain.factor(step)))
        assert optimizer.param_groups[1]["weight_decay"] == 0
        optimizer.step()
        scheduler.step()
    assert decays[:1] + decays[10:11] + decays[20:] == pytest.approx([0.04, 0.22, 0.4, 0.4, 0.4])
    assert all(a == pytest.approx(b) for a, b in rates_)


def test_a_resumed_decay_goes_on_from_where_it_was():
    def made():
        optimizer = torch.optim.AdamW([parameter()], lr=1.0, weight_decay=0.1)
        return optimizer, WarmupCosineDecay(optimizer, 10, decay_factor=4.0)

    straight, schedule = made()
    for _ in range(4):
        straight.step()
        schedule.step()
    resumed, again = made()
    resumed.load_state_dict(straight.state_dict())
    again.load_state_dict(schedule.state_dict())
    for optimizer, scheduler in ((straight, schedule), (resumed, again)):
        optimizer.step()
        scheduler.step()
    assert straight.param_groups[0]["weight_decay"] == resumed.param_groups[0]["weight_decay"]
    assert again.base_decays == [0.1]
    with pytest.raises(UserError, match="decay_factor=-1 must be at least 0"):
        WarmupCosineDecay(straight, 10, decay_factor=-1)


def test_a_line_reaches_its_end_and_stays_there():
    assert [line_between(0.04, 0.07, share, 0.5) for share in (0, 0.25, 0.5, 1)] == pytest.approx(
        [0.04, 0.055, 0.07, 0.07]
    )
    assert line_between(0.04, 0.07, 0.0, 0.0) == 0.07


def test_a_teacher_follows_on_a_half_cosine_and_sharpens_on_a_line():
    assert [TeacherMomentum(0.5, 0.9)(share) for share in (0, 0.25, 0.5, 1)] == pytest.approx(
        [0.5, 0.55857864, 0.7, 0.9]
    )
    assert [TeacherTemperature(0.04, 0.07, 0.5)(share) for share in (0, 0.25, 0.5, 1)] == pytest.approx(
        [0.04, 0.055, 0.07, 0.07]
    )


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: TeacherMomentum(float("nan"), 1.0), r"momentum=nan must lie in \[0, 1\]"),
        (lambda: TeacherMomentum(1.0, 1.1), r"final_momentum=1.1 must lie in \[0, 1\]"),
        (lambda: TeacherTemperature(0.04, 0.0, 0.5), "final_temperature=0.0 must be above 0 and finite"),
        (lambda: TeacherTemperature(0.04, 0.07, 1.5), r"temperature_warmup=1.5 must lie in \[0, 1\]"),
    ],
)
def test_a_teachers_schedules_check_themselves(made, message):
    with pytest.raises(UserError, match=message):
        made()


def of_run(schedule, total_steps, lr=1.0):
    """The rate of each step."""
    optimizer = torch.optim.SGD([parameter()], lr=lr)
    return rates(schedule(optimizer, total_steps), optimizer, total_steps)


def test_a_staircase_falls_by_its_factor_at_each_share_of_the_run():
    found = of_run(partial(Staircase, at=(0.5, 0.9), factor=0.1), 10, lr=2.0)
    assert found == pytest.approx([2.0] * 5 + [0.2] * 4 + [0.02])
    assert of_run(partial(Staircase, at=()), 3) == of_run(partial(Staircase, at=1), 3) == [1.0] * 3


def test_a_staircase_of_equal_parts_falls_between_them_and_not_behind_the_run():
    optimizer = torch.optim.SGD([parameter()], lr=0.8)
    found = rates(Staircase(optimizer, 6, at=3, factor=0.5), optimizer, 8)
    assert found == pytest.approx([0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.2, 0.2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": (0.9, 0.5)}, "must be ascending shares"),
        ({"at": (1.0,)}, r"in \(0, 1\)"),
        ({"factor": 0.0}, r"factor=0.0 in \(0, 1\]"),
        ({"at": 0}, "parts of the run, 1 or more"),
        ({"total_steps": 0}, "total_steps=0 must be at least 1"),
    ],
)
def test_a_staircase_refuses_what_lies_outside_its_ranges(options, message):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(UserError, match=message):
        Staircase(optimizer, **{"total_steps": 5, **options})


@pytest.mark.parametrize("schedule", [Staircase, WarmupCosine, torch.optim.lr_scheduler.CosineAnnealingLR])
def test_schedules_in_turn_begin_anew_with_each_part(schedule):
    lengths = (4, 7, 1, 5)
    expected = [rate for length in lengths for rate in of_run(schedule, length)]
    assert of_run(restarting_schedule(schedule, lengths), sum(lengths)) == pytest.approx(expected)
    factors = (1.0, 0.01, 3.0, 0.5)
    expected = [f * rate for f, length in zip(factors, lengths, strict=True) for rate in of_run(schedule, length)]
    assert of_run(restarting_schedule(schedule, lengths, factors), sum(lengths)) == pytest.approx(expected)
