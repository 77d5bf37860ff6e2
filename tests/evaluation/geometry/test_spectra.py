import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightspan.evaluation.geometry.spectra import (
    effective_rank,
    energy_shares,
    gram_singular_values,
    leading_energy,
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


@pytest.mark.parametrize("measure", [*MEASURES, energy_shares, lambda values: leading_energy(values, 2)])
def test_a_batch_is_measured_one_by_one(measure):
    values = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(-1, True).values
    values[1, 2] = 0
    one_by_one = torch.stack([torch.stack([measure(v) for v in row]) for row in values])
    assert torch.equal(measure(values), one_by_one)


def test_the_leading_energy_is_what_the_best_frame_captures():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = torch.linalg.svd(x).Vh[:2].mT
    other = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    captured, less = ((x @ frame).square().sum() / x.square().sum() for frame in (best, other))
    assert leading_energy(singular_values(x), 2).item() == pytest.approx(captured.item())
    assert less < captured
    assert leading_energy(singular_values(x), 6).item() == pytest.approx(1)


def test_a_gram_of_either_side_gives_the_singular_values():
    x = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.linalg.svdvals(x)
    assert torch.allclose(gram_singular_values(x.mT @ x), expected)
    assert torch.allclose(gram_singular_values(x @ x.mT)[:, :6], expected)
    assert gram_singular_values(x @ x.mT)[:, 6:].abs().max() < 1e-6


@pytest.mark.parametrize("measure", MEASURES)
def test_one_matrix_that_is_not_finite_leaves_the_others_alone(measure):
    gram = torch.stack((torch.eye(3), torch.full((3, 3), torch.nan), 4 * torch.eye(3)))
    measured = measure(gram_singular_values(gram))
    assert measured[[0, 2]].tolist() == pytest.approx([3, 3])
    assert measured[1].isnan()
