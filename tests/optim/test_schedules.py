"""Schedules: rates worked by hand, ratios between groups, resume, ranges."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lightspan.errors import UserError
from lightspan.optim.schedules import WarmupCosine


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
    [({"total_steps": 0}, "total_steps=0"), ({"warmup": 1.0}, "warmup=1.0"), ({"final": 2.0}, "final=2.0")],
)
def test_schedules_refuse_what_lies_outside_their_ranges(options, message):
    with pytest.raises(UserError, match=message):
        WarmupCosine(torch.optim.SGD([parameter()], lr=1.0), **{"total_steps": 10, **options})
