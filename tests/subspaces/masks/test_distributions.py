"""The laws of Concrete and hard Concrete, from their definition."""

import math

import pytest
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.subspaces.masks.distributions import (
    BinaryConcrete,
    HardConcrete,
    MaskDistribution,
    concrete,
    threshold,
)
from lightspan.subspaces.masks.draws import uniform

BOTH = [BinaryConcrete(), HardConcrete()]
N = 100_000


def logits(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def samples(kind: MaskDistribution, logit: float, temperature: float) -> Tensor:
    return kind.sample(logits(logit), temperature, uniform(0, 0, "w", [N], dtype=torch.float64))


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 3.0])
@pytest.mark.parametrize("logit", [-2.0, 0.0, 0.7])
def test_concrete_is_above_one_half_with_probability_sigmoid_of_its_logit(logit: float, temperature: float) -> None:
    p = torch.sigmoid(logits(logit)).item()
    share = (samples(BinaryConcrete(), logit, temperature) > 0.5).double().mean().item()
    assert abs(share - p) < 4 * (p * (1 - p) / N) ** 0.5


def test_concrete_is_torchs_relaxed_bernoulli() -> None:
    """The sample inverts the distribution function: du/dm is the density of m."""
    u = uniform(0, 0, "w", [1000], dtype=torch.float64).requires_grad_()
    m = concrete(logits(0.3), 0.5, u)
    (slope,) = torch.autograd.grad(m.sum(), u)
    law = torch.distributions.RelaxedBernoulli(torch.tensor(0.5).double(), logits=logits(0.3), validate_args=False)
    inside = (m > 1e-6) & (m < 1 - 1e-6)
    assert inside.sum() > 900
    torch.testing.assert_close(1 / slope[inside], law.log_prob(m[inside]).exp(), rtol=1e-6, atol=0)


def test_the_gradient_of_concrete_is_m_times_one_minus_m_over_t() -> None:
    x = logits(-1.0, 0.0, 2.0).requires_grad_()
    m = concrete(x, 0.5, logits(0.2, 0.5, 0.9))
    (gradient,) = torch.autograd.grad(m.sum(), x)
    torch.testing.assert_close(gradient, m * (1 - m) / 0.5)


@pytest.mark.parametrize("temperature", [2 / 3, 0.3])
@pytest.mark.parametrize("logit", [-1.0, 0.0, 1.5])
def test_the_expected_l0_of_hard_concrete_is_how_often_it_is_not_zero(logit: float, temperature: float) -> None:
    kind = HardConcrete()
    p = kind.keep_probability(logits(logit), temperature).item()
    assert p == pytest.approx(1 / (1 + math.exp(-(logit - temperature * math.log(0.1 / 1.1)))))
    share = (samples(kind, logit, temperature) != 0).double().mean().item()
    assert abs(share - p) < 4 * (p * (1 - p) / N) ** 0.5


def test_hard_concrete_is_exactly_zero_and_one_at_times() -> None:
    drawn = samples(HardConcrete(), 0.0, 2 / 3)
    assert (drawn == 0).any()
    assert (drawn == 1).any()
    assert ((drawn > 0) & (drawn < 1)).any()


@pytest.mark.parametrize("kind", BOTH)
def test_infinite_logits_are_entries_that_stay_and_that_go(kind: MaskDistribution) -> None:
    u = uniform(0, 0, "w", [1000])
    for logit, value in ((torch.inf, 1.0), (-torch.inf, 0.0)):
        x = torch.full([1000], logit)
        assert (kind.sample(x, 0.5, u) == value).all()
        assert (kind.mean_mask(x) == value).all()
        assert (kind.keep_probability(x, 0.5) == value).all()


@pytest.mark.parametrize("kind", BOTH)
def test_half_precision_logits_are_computed_in_float32(kind: MaskDistribution) -> None:
    x, u = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.bfloat16), uniform(0, 0, "w", [3])
    assert kind.sample(x, 0.5, u).dtype == torch.float32
    assert torch.equal(kind.sample(x, 0.5, u), kind.sample(x.float(), 0.5, u))
    assert kind.sample(torch.empty(0), 0.5, torch.empty(0)).shape == (0,)


def test_a_threshold_is_what_small_temperatures_lead_to() -> None:
    x = logits(-0.5, 0.0, 0.5, math.nan)
    assert threshold(x).tolist() == [False, False, True, False]
    assert threshold(x, at=-1.0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("kind", BOTH)
def test_a_temperature_out_of_range_is_refused(kind: MaskDistribution, temperature: float) -> None:
    for ask in (kind.keep_logits, lambda x, t: kind.sample(x, t, torch.tensor(0.5))):
        with pytest.raises(UserError, match=rf"temperature={temperature} of a mask must be a finite number above 0"):
            ask(torch.zeros(1), temperature)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.1), (-0.1, 1.0), (-math.inf, 1.1)])
def test_hard_concrete_needs_room_on_both_sides(low: float, high: float) -> None:
    with pytest.raises(UserError, match=f"HardConcrete low={low} must be below 0 and high={high} above 1"):
        HardConcrete(low, high)
