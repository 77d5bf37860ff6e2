"""Learners are a partition of the coordinates, a split leaves kept ones as they are, and what a coordinate is worth."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.nn.heads.subspace_learners import SubspaceLearners

FALSE = torch.tensor(False)


def head(width: int = 12, inputs: int = 7) -> SubspaceLearners:
    torch.manual_seed(0)
    return SubspaceLearners(inputs, width)


def rows(count: int = 5) -> Tensor:
    return torch.randn(count, 7, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("least", [1, 2, 4])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_after_any_splits_learners_are_a_partition_of_the_coordinates(least: int, threshold: float) -> None:
    layer = head()
    for seed in range(5):
        before, score = layer.owner_D.clone(), torch.rand(12, generator=torch.Generator().manual_seed(seed))
        freed = layer.split(score, threshold, least)
        changed = layer.owner_D != before
        assert torch.equal(changed, torch.zeros_like(changed) if freed is None else freed)
    counts = layer.owner_D.bincount()
    assert counts.sum() == 12
    assert (counts > 0).all()
    assert len(counts) == layer.learners


def test_a_split_keeps_the_outputs_of_all_coordinates_that_stay_bit_for_bit_and_draws_the_others_anew() -> None:
    layer, score = head(), torch.tensor([9.0, 1, 8, 2, 7, 0, 6, 3, 5, 4, -9, 1])
    before = layer(rows())
    freed = layer.split(score)
    assert freed.nonzero()[:, 0].tolist() == [1, 3, 5, 7, 9, 11]  # at most half of the way from 0 to 9
    after = layer(rows())
    assert torch.equal(after[:, ~freed], before[:, ~freed])
    assert (after[:, freed] != before[:, freed]).all()
    assert layer.owner_D.tolist() == freed.long().tolist()
    again = head()
    again.split(score)
    assert torch.equal(again.weight, layer.weight)  # from its seed, on every rank


@pytest.mark.parametrize(
    ("score", "why"),
    [
        (torch.ones(12), "all score alike"),
        (torch.zeros(12), "no gradient at all"),
        (torch.eye(12)[0], "one coordinate would stay"),
        (torch.full((12,), torch.nan), "nothing is known"),
    ],
)
def test_a_score_that_tells_nothing_or_keeps_too_few_leaves_the_learner_whole(score: Tensor, why: str) -> None:
    layer = head()
    before = layer.weight.clone()
    assert layer.split(score, least=2) is None
    assert torch.equal(layer.weight, before)
    assert layer.learners == 1


def test_a_learner_of_one_coordinate_cannot_be_split() -> None:
    assert head(width=1).split(torch.ones(1), least=1) is None


def test_slices_are_of_unit_length_each_and_a_row_sees_its_own() -> None:
    layer = head()
    layer.split(torch.arange(12.0))
    a_BD = layer(rows())
    z_BD, first = layer.slices(a_BD), layer.owner_D == 0
    for learner in (0, 1):
        own = layer.owner_D == learner
        torch.testing.assert_close(z_BD[:, own], F.normalize(a_BD[:, own], dim=1))
        mine = layer.slice_of(a_BD, torch.full((5,), learner), FALSE)
        torch.testing.assert_close(mine[:, own], z_BD[:, own])
        assert not mine[:, ~own].any()
    mixed = layer.slice_of(a_BD, torch.tensor([0, 1, 0, 1, 0]), FALSE)
    assert torch.equal(mixed.bool().all(dim=1), torch.zeros(5, dtype=torch.bool))
    assert torch.equal(mixed[0].bool(), first)
    whole = layer.slice_of(a_BD, torch.zeros(5, dtype=torch.int64), ~FALSE)
    torch.testing.assert_close(whole, F.normalize(a_BD, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_zeros_stay_zero_without_a_gradient(dtype: torch.dtype) -> None:
    a_BD = torch.zeros(2, 12, dtype=dtype, requires_grad=True)
    z_BD = head().to(dtype).slices(a_BD)
    z_BD.sum().backward()
    assert not z_BD.any()
    assert not a_BD.grad.any()


def test_importance_is_the_sum_over_samples_of_activation_times_gradient_before_and_after_unit_length() -> None:
    layer = head().double()
    layer.split(torch.arange(12.0))
    layer.zero_grad()
    a_BD = layer(rows().double())
    z_BD = layer.slices(a_BD)
    for tensor in (a_BD, z_BD):
        tensor.retain_grad()
    again = layer.slices(z_BD)  # the loss compares unit vectors, as the authors' does
    (again @ torch.arange(12.0, dtype=torch.float64)).square().sum().backward()
    torch.testing.assert_close(layer.taylor(), (a_BD * a_BD.grad).sum(dim=0))
    torch.testing.assert_close(layer.taylor(), (z_BD * z_BD.grad).sum(dim=0))


def test_of_a_linear_loss_it_is_what_the_loss_loses_without_the_coordinate_and_zero_where_no_gradient_is() -> None:
    layer, slope_D = head().double(), torch.arange(12.0, dtype=torch.float64) - 3

    def loss(a_BD: Tensor) -> Tensor:
        return (a_BD @ slope_D).mean()

    a_BD = layer(rows().double())
    loss(a_BD).backward()
    for j in range(12):
        without = a_BD.detach().clone()
        without[:, j] = 0
        assert abs(float(layer.taylor()[j] - (loss(a_BD) - loss(without)))) < 1e-6
    assert layer.taylor()[3] == 0
    assert not head().taylor().any()  # before any backward pass


def test_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="out_features=0 must be at least 1"):
        SubspaceLearners(7, 0)
    with pytest.raises(UserError, match="seed=-1 must"):
        SubspaceLearners(7, 4, seed=-1)
