"""KoLeo: by hand, invariances, gradients, and equal rows."""

import math

import pytest
import torch

from lightspan.objectives.koleo import LEAST, koleo


def test_worked_by_hand() -> None:
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, -1.0]])  # distances sqrt 2, sqrt 2 and sqrt 2 of nearest ones
    assert koleo(x).item() == pytest.approx(-0.5 * math.log(2))


def test_it_is_blind_to_lengths_order_and_rotations_and_falls_as_rows_spread() -> None:
    x = torch.randn(9, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    for same in (x * torch.rand(9, 1).double().add(0.1), x.flip(0), x @ rotation):
        torch.testing.assert_close(koleo(same), koleo(x))
    assert koleo(x) < koleo(x + 5)
    assert torch.autograd.gradcheck(koleo, x.requires_grad_())


def test_neighbours_are_sought_within_groups_of_rows_of_which_the_last_may_be_smaller() -> None:
    x = torch.randn(8, 4, dtype=torch.float64)
    parts = [3 * koleo(x[:3]), 3 * koleo(x[3:6]), 2 * koleo(x[6:])]
    torch.testing.assert_close(koleo(x, 3), torch.stack(parts).sum() / 8)
    torch.testing.assert_close(koleo(x, 7), 7 * koleo(x[:7]) / 8)  # the last one has no neighbour
    torch.testing.assert_close(koleo(x, 8), koleo(x))
    assert torch.autograd.gradcheck(lambda rows: koleo(rows, 3), x.requires_grad_())


def test_it_is_lightlys() -> None:
    lightly = pytest.importorskip("lightly.loss")
    x = torch.randn(16, 8)
    torch.testing.assert_close(koleo(x), lightly.KoLeoLoss()(x), rtol=1e-5, atol=1e-5)


def test_a_row_that_is_not_a_number_is_not_hidden() -> None:
    x = torch.randn(4, 3)
    x[1] = torch.nan
    assert koleo(x, 2).isnan()


def test_equal_rows_have_the_least_distance_and_no_gradient_and_one_row_gives_nothing() -> None:
    equal = torch.ones(3, 4, requires_grad=True)
    loss = koleo(equal)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(LEAST))
    assert equal.grad is not None
    assert equal.grad.abs().max() == 0
    for few in (torch.ones(1, 4), torch.ones(0, 4)):
        assert koleo(few).item() == koleo(few, 2).item() == 0
