import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightspan.analysis.spectra import (
    captured_energy,
    effective_rank,
    participation_ratio,
    singular_values,
    stable_rank,
)

MEASURES = [effective_rank, participation_ratio, stable_rank]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_equal_values_count_themselves_and_zeros_add_nothing(measure, rank):
    values = torch.tensor([2.5] * rank + [0.0] * (6 - rank), dtype=torch.float64)
    assert measure(values).item() == pytest.approx(rank)
    assert measure(torch.zeros(4)).item() == 0


def test_values_two_and_one_by_hand():
    values = torch.tensor([2.0, 1.0], dtype=torch.float64)
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert effective_rank(values).item() == pytest.approx(math.exp(entropy))
    assert participation_ratio(values).item() == pytest.approx(25 / 17)
    assert stable_rank(values).item() == pytest.approx(5 / 4)


@pytest.mark.parametrize("measure", MEASURES)
@given(values=st.lists(st.floats(0.01, 100), min_size=1, max_size=8), scale=st.floats(1e-3, 1e3))
def test_measures_lie_between_one_and_the_count_and_know_no_scale(measure, values, scale):
    values = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    assert 1 - 1e-9 <= measure(values).item() <= len(values) + 1e-9
    assert measure(scale * values).item() == pytest.approx(measure(values).item())


def test_centring_removes_a_common_offset_and_nothing_else():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centred = singular_values(x, center=True)
    assert torch.allclose(singular_values(x + 100, center=True), centred)
    assert torch.allclose(centred.square().sum(), 19 * x.var(dim=0).sum())
    assert torch.allclose(singular_values(x).square().sum(), x.square().sum())


def test_captured_energy_is_the_share_of_the_kept_columns():
    x = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    assert captured_energy(x, torch.eye(3)[:, 1:]).item() == pytest.approx(16 / 25)
    assert captured_energy(x, torch.eye(3)).item() == pytest.approx(1)
    assert captured_energy(torch.zeros(2, 3), torch.eye(3)).item() == 0
