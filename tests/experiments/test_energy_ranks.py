"""A rank for each matrix: enough for the energy, and no more than the budget."""

from itertools import product

import pytest
import torch
from torch import nn

from lightspan.errors import UserError
from lightspan.experiments.ranks import RankByEnergy
from lightspan.optim.low_rank import LowRank


def with_spectrum(values, rows=12, columns=8, seed=0):
    """A parameter whose gradient has the given singular values."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64)).Q
    weight = nn.Parameter(torch.zeros(rows, columns, dtype=torch.float64))
    weight.grad = left * torch.tensor(values, dtype=torch.float64) @ right.T
    return weight


STEEP, FLAT = [8.0, 1, 1, 0.5, 0.1, 0.1, 0.1, 0.1], [1.0] * 8


def test_the_rank_is_the_smallest_that_captures_the_energy():
    assert RankByEnergy(0.9, least=1).choose([with_spectrum(STEEP), with_spectrum(FLAT)]) == [1, 8]
    assert RankByEnergy(0.99, least=1).choose([with_spectrum(STEEP)]) == [3]
    assert RankByEnergy(0.9, least=2, most=5).choose([with_spectrum(STEEP), with_spectrum(FLAT)]) == [2, 5]


def test_within_a_budget_no_other_choice_captures_more():
    weights = [
        with_spectrum(STEEP),
        with_spectrum([3.0, 2, 2, 1, 1, 0.5, 0.2, 0.1], seed=1),
        with_spectrum(FLAT, seed=2),
    ]
    cost = 4 * (2 * 12 + 8)
    chosen = RankByEnergy(0.999, least=1, budget_mib=9 * cost / 2**20).choose(weights)
    assert sum(chosen) == 9
    shares = [torch.linalg.svdvals(w.grad).square() / w.grad.square().sum() for w in weights]

    def captured(ranks):
        return sum(float(share[:r].sum()) for share, r in zip(shares, ranks, strict=True))

    best = max(captured(r) for r in product(range(1, 9), repeat=3) if sum(r) <= 9)
    assert captured(chosen) == pytest.approx(best)


def test_an_impossible_budget_says_by_how_much():
    with pytest.raises(
        UserError, match=r"budget_mib=1e-06 is too small even for rank 4 of all 1 matrices; raise it by"
    ):
        RankByEnergy(budget_mib=1e-6).choose([with_spectrum(FLAT)])


def test_groups_of_one_rank_each_make_an_optimiser_and_the_rest_gets_adamw():
    weights = [with_spectrum(STEEP), with_spectrum(FLAT, seed=1), with_spectrum(STEEP, seed=2)]
    bias, late = (nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in ((8,), (12, 8)))
    bias.grad = torch.ones_like(bias)
    optimizer = LowRank(RankByEnergy(0.9, least=2, most=7).groups([bias, *weights, late]), lr=0.1)
    optimizer.step()
    assert [optimizer.state[w]["exp_avg"].shape[1] for w in weights] == [2, 7, 2]
    assert optimizer.state[bias]["exp_avg"].shape == (8,)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RankByEnergy(energy=0), r"energy=0 must be in \(0, 1\]"),
        (lambda: RankByEnergy(least=9, most=5), "least=9, most=5"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
