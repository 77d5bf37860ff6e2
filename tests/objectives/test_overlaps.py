"""Losses of overlaps: by hand, at their least, and what they do not depend on."""

import math

import pytest
import torch
from torch import Tensor

from lightspan.objectives.overlaps import (
    base_similarities,
    overlap_loss,
    positive_cosines,
    split_overlap_loss,
    surprise,
)


def rows(count: int, seed: int = 0, volumes: int = 2) -> Tensor:
    return torch.randn(volumes, count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shares() -> Tensor:
    return torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [[0.25, 0.25, 0.5], [0.0, 0.0, 1.0]]], dtype=torch.float64)


def test_losses_by_hand() -> None:
    y, s = torch.tensor([[[0.75, 0.25, 0.0]]]), torch.tensor([[[0.25, 0.5, 0.5]]])
    losses = [-math.log(0.5), -math.log(0.75), -math.log(0.5)]
    assert float(overlap_loss(y, s)) == pytest.approx(sum(losses) / 3, rel=1e-5)
    expected = 0.75 * losses[0] + 0.25 * losses[1] + losses[2]
    assert float(split_overlap_loss(y, s)) == pytest.approx(expected, rel=1e-5)
    q = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]])
    torch.testing.assert_close(base_similarities(q, q), torch.tensor([[0.5**0.5, 0, 0]]))


def test_losses_are_0_where_similarities_are_the_overlaps_and_base_crops_are_at_right_angles() -> None:
    assert float(overlap_loss(shares(), shares())) == 0
    assert float(split_overlap_loss(shares(), shares())) == 0
    bases = torch.eye(5).expand(2, 5, 5)
    assert not base_similarities(bases, bases).any()
    assert base_similarities(bases[:, :1], bases[:, :1]).shape == (2, 0)
    assert float(surprise(torch.ones(()))) == pytest.approx(-math.log(1e-6), rel=0.01)


def test_a_volume_without_any_overlap_or_with_nothing_apart_has_one_part_alone() -> None:
    s = torch.full((1, 2, 2), 0.5)
    for y, expected in ((torch.zeros(1, 2, 2), -math.log(0.5)), (torch.full((1, 2, 2), 0.25), -math.log(0.75))):
        assert float(split_overlap_loss(y, s)) == pytest.approx(expected, rel=1e-5)


def test_the_order_of_base_crops_and_of_crops_does_not_matter() -> None:
    crops, bases, order = rows(2), rows(3, seed=1), torch.tensor([2, 0, 1])
    for loss in (overlap_loss, split_overlap_loss):
        expected = loss(shares(), positive_cosines(crops, bases))
        torch.testing.assert_close(loss(shares()[..., order], positive_cosines(crops, bases[:, order])), expected)
        torch.testing.assert_close(loss(shares().flip(1), positive_cosines(crops.flip(1), bases)), expected)
    torch.testing.assert_close(
        base_similarities(bases, bases).sum(1), base_similarities(bases.flip(1), bases.flip(1)).sum(1)
    )


def test_gradients_are_exact() -> None:
    crops, bases = rows(2).requires_grad_(), rows(3, seed=1).requires_grad_()
    for loss in (overlap_loss, split_overlap_loss):
        assert torch.autograd.gradcheck(lambda p, q, loss=loss: loss(shares(), positive_cosines(p, q)), (crops, bases))
    assert torch.autograd.gradcheck(lambda q: base_similarities(q, q).sum(), bases)
    # At the bound too, where the logarithm would be infinite.
    equal = torch.ones(1, 1, 5, requires_grad=True)
    overlap_loss(torch.zeros(1, 1, 1), positive_cosines(equal, torch.ones(1, 1, 5))).backward()
    assert equal.grad is not None
    assert equal.grad.isfinite().all()
