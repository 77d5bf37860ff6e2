"""The fixed head that weights features ever less, and encoders read behind a head."""

import pytest
import torch
from torch import nn

from lightspan.core.errors import UserError
from lightspan.nn.heads.reweighting import BehindHead, ReweightingHead


def test_each_coordinate_weighs_kappa_times_less_than_the_one_before() -> None:
    given = torch.tensor([[1.0, 1.0, 1.0], [8.0, -4.0, 4.0]])
    assert torch.equal(ReweightingHead(3, kappa=2.0)(given), torch.tensor([[1, 0.5, 0.25], [8, -2, 1]]))


def test_nothing_in_it_is_trained_or_saved() -> None:
    head = ReweightingHead(4)
    assert not [*head.parameters()]
    assert not head.state_dict()
    assert (head.in_features, head.out_features) == (4, 4)


def test_at_kappa_one_it_is_the_identity_in_values_and_gradients() -> None:
    given = torch.randn(5, 4, requires_grad=True)
    out = ReweightingHead(4, kappa=1.0)(given)
    assert torch.equal(out, given)
    out.square().sum().backward()
    assert torch.equal(given.grad, 2 * given.detach())  # type: ignore[arg-type]


def test_the_last_of_many_coordinates_underflow_to_finite_numbers() -> None:
    given = torch.randn(2, 2048, requires_grad=True)
    out = ReweightingHead(2048, kappa=1.1)(given)
    out.sum().backward()
    assert out.isfinite().all()
    assert given.grad is not None
    assert given.grad.isfinite().all()
    assert (given.grad[:, -1] == 0).all()


def test_half_precision_stays_what_it_is() -> None:
    assert ReweightingHead(4)(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_an_encoder_is_read_behind_its_head() -> None:
    backbone, head, given = nn.Linear(3, 4), nn.Linear(4, 2), torch.randn(5, 3)
    behind = BehindHead(backbone, head)
    assert torch.equal(behind(given), head(backbone(given)))
    assert behind.num_features == 2
    with pytest.raises(UserError, match=r"head.in_features=5, but Linear gives 4 features"):
        BehindHead(backbone, nn.Linear(5, 2))


def test_weights_that_grow_are_refused() -> None:
    for kappa in (0.5, float("inf"), float("nan")):
        with pytest.raises(UserError, match=r"kappa=.* at least 1 and finite"):
            ReweightingHead(4, kappa=kappa)
    with pytest.raises(UserError, match="in_features=0 must be at least 1"):
        ReweightingHead(0)
