"""The order of sub-networks: the stated multiplicities, without replacement, and nothing but seed and step."""

from collections import Counter

import pytest

from lightspan.core.errors import UserError
from lightspan.nn.subnets import Size, SubNetSampler

WIDTHS, DEPTHS = [32, 64, 96], [2, 4, 6]


def test_each_cycle_visits_every_size_as_often_as_stated_and_the_whole_one_never() -> None:
    sampler = SubNetSampler(WIDTHS, DEPTHS)
    expected = {(32, 2): 9, (32, 4): 6, (32, 6): 3, (64, 2): 6, (64, 4): 4, (64, 6): 2, (96, 2): 3, (96, 4): 2}
    length = sum(expected.values())
    assert Counter(sampler.cycle) == expected
    cycles = [[sampler.at(length * cycle + place) for place in range(length)] for cycle in range(3)]
    assert all(Counter(cycle) == expected for cycle in cycles)
    assert cycles[0] != cycles[1]


def test_the_paper_has_143_networks_and_its_code_a_list_of_572() -> None:
    sampler = SubNetSampler(range(384, 1025, 64), range(12, 25))
    assert len(Counter(sampler.cycle)) == 142
    assert Counter(sampler.cycle)[Size(384, 12)] == 9
    assert Counter(sampler.cycle)[Size(1024, 23)] == 1
    assert len(sampler.cycle) == 572


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    first, again, other = (SubNetSampler(WIDTHS, DEPTHS, seed=seed) for seed in (3, 3, 4))
    late = [first.at(step) for step in range(200, 250)]
    assert [again.at(step) for step in reversed(range(200, 250))] == late[::-1]
    assert [other.at(step) for step in range(200, 250)] != late
    assert str(late[0]) == f"{late[0].width}x{late[0].depth}"


def test_without_a_preference_all_sizes_come_equally_often() -> None:
    assert set(Counter(SubNetSampler(WIDTHS, DEPTHS, small_first=1).cycle).values()) == {1}


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match=r"hold the whole network alone; add a smaller size"):
        SubNetSampler([32], [2])
    with pytest.raises(UserError, match=r"small_first=0.5 must"):
        SubNetSampler(WIDTHS, DEPTHS, small_first=0.5)
