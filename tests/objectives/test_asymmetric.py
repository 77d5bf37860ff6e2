"""The asymmetric loss: by hand, against the cross-entropy it contains, and what is not known."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.objectives.asymmetric import asymmetric_loss
from lightspan.objectives.means import known_mean

HOLDS = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1]])
KNOWN = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]])


def logits(dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 * torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_without_focus_and_margin_it_is_the_binary_cross_entropy() -> None:
    found = asymmetric_loss(logits(), HOLDS, None, 0.0, 0.0, 0.0)
    expected = F.binary_cross_entropy_with_logits(logits(), HOLDS.double())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_by_hand() -> None:
    """p = 3/4 and 1/4: one tag that holds and one that does not, with g+ = 1, g- = 2, m = 1/8."""
    x = torch.tensor([[math.log(3.0), -math.log(3.0)]], dtype=torch.float64)
    expected = -(1 / 4 * math.log(3 / 4) + (1 / 4 - 1 / 8) ** 2 * math.log(1 - (1 / 4 - 1 / 8))) / 2
    found = asymmetric_loss(x, torch.tensor([[1, 0]]), None, 1.0, 2.0, 1 / 8)
    assert float(found) == pytest.approx(expected, abs=1e-12)


def test_a_wrong_tag_below_the_margin_costs_nothing_and_has_no_gradient() -> None:
    x = torch.tensor([[math.log(0.04 / 0.96), math.log(0.06 / 0.94)]], dtype=torch.float64, requires_grad=True)
    asymmetric_loss(x, torch.zeros(1, 2), negative_focus=0.0).backward()
    assert x.grad is not None
    assert x.grad[0, 0] == 0
    assert x.grad[0, 1] > 0


def test_what_is_not_known_has_no_gradient_and_all_that_is_weighs_the_same() -> None:
    x = logits().requires_grad_()
    loss = asymmetric_loss(x, HOLDS, KNOWN)
    loss.backward()
    assert x.grad is not None
    assert not x.grad[KNOWN == 0].any()
    one_by_one = [
        asymmetric_loss(logits()[i : i + 1, j : j + 1], HOLDS[i : i + 1, j : j + 1]) for i, j in KNOWN.nonzero()
    ]
    torch.testing.assert_close(loss.detach(), torch.stack(one_by_one).mean())
    changed = torch.where(KNOWN.bool(), logits(), torch.nan)
    torch.testing.assert_close(asymmetric_loss(changed, HOLDS, KNOWN), loss.detach())


def test_as_many_copies_of_the_tags_leave_its_scale() -> None:
    torch.testing.assert_close(
        asymmetric_loss(logits().repeat(1, 7), HOLDS.repeat(1, 7)), asymmetric_loss(logits(), HOLDS)
    )


@pytest.mark.parametrize("settings", [(0.0, 4.0, 0.05), (0.0, 0.0, 0.0), (1.0, 1.0, 0.2), (2.0, 3.0, 0.0)])
def test_gradcheck(settings: tuple[float, float, float]) -> None:
    assert torch.autograd.gradcheck(lambda x: asymmetric_loss(x, HOLDS, KNOWN, *settings), logits().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [(0.0, 4.0, 0.05), (0.0, 0.0, 0.0), (1.0, 1.0, 0.0)])
def test_certain_logits_stay_finite(dtype: torch.dtype, settings: tuple[float, float, float]) -> None:
    x = torch.tensor([[-1e4, 1e4, 0.0, 80.0, -80.0]], dtype=dtype).repeat(2, 1).requires_grad_()
    loss = asymmetric_loss(x, torch.tensor([[1] * 5, [0] * 5]), None, *settings)
    loss.backward()
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.isfinite().all()
    if settings[2] == 0:  # with a margin, no wrong tag costs more than -log m
        assert x.grad[1, 1] > 0


@pytest.mark.parametrize("rows", [0, 3])
def test_where_nothing_is_known_loss_and_gradient_are_zero(rows: int) -> None:
    x = logits()[:rows].requires_grad_()
    loss = asymmetric_loss(x, HOLDS[:rows], torch.zeros(rows, 5))
    loss.backward()
    assert loss == 0
    assert not x.grad.any()


def test_a_mean_of_what_is_known_reads_nothing_else() -> None:
    x = torch.tensor([1.0, torch.nan, 3.0, torch.inf], requires_grad=True)
    mean = known_mean(x, torch.tensor([True, False, True, False]))
    mean.backward()
    assert mean.item() == 2.0
    assert x.grad.tolist() == [0.5, 0.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"positive_focus": -1.0}, r"positive_focus=-1\.0 must be 0 or at least 1"),
        ({"negative_focus": 0.5}, r"negative_focus=0\.5 must be 0 or at least 1"),
        ({"margin": 1.0}, r"margin=1\.0 must"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        asymmetric_loss(logits(), HOLDS, **settings)
