"""Masks by gradient, step by step, without a Trainer."""

import pytest
import torch
from torch import nn

from lightspan.optim.masks.by_gradient import ByGradient
from lightspan.optim.masks.place import Place
from lightspan.subspaces.masks.allocation import Uniform
from lightspan.subspaces.masks.distributions import BinaryConcrete, HardConcrete, MaskDistribution
from lightspan.subspaces.masks.schedules import Linear


def begun(learner: ByGradient, density: float | Linear, optimizer: type[torch.optim.Optimizer]) -> ByGradient:
    weight = nn.Parameter(torch.randn(20, 10, generator=torch.Generator().manual_seed(0)))
    density = density if isinstance(density, Linear) else Linear(density, density)
    learner.begin({"w": Place("w", weight)}, Uniform(), density, 0, optimizer([weight], lr=0.1, weight_decay=0.5))
    return learner


@pytest.mark.parametrize("distribution", [BinaryConcrete(), HardConcrete()])
def test_the_expected_count_falls_with_the_density_step_by_step(distribution: MaskDistribution) -> None:
    falls = Linear(1.0, 0.2)
    learner = begun(ByGradient(distribution, Linear(1.0, 0.5), start=3.0), falls, torch.optim.AdamW)
    generator = torch.Generator().manual_seed(1)
    limited = 0
    for step in range(1, 21):
        learner.draw(step - 1, (step - 1) / 20)
        learner.pull("w", torch.randn(20, 10, generator=generator))
        learner.update(step, step / 20)
        limit = 200 * falls.at(step / 20)
        expected = learner.open_counts()["w"]
        assert expected <= limit + 1e-2
        limited += expected == pytest.approx(limit, abs=1e-2)
    assert limited >= 15


def test_logits_are_not_decayed_with_the_weights() -> None:
    learner = begun(ByGradient(start=2.0), 1.0, torch.optim.AdamW)
    for step in range(1, 4):
        learner.draw(step - 1, 0.0)
        learner.pull("w", torch.zeros(20, 10))
        learner.update(step, 0.0)
    assert (learner.logits["w"] == 2).all()


def test_entries_are_open_whose_mean_mask_is_more_open_than_closed() -> None:
    """Which is not where the logit is above 0, if the mask is stretched further to one side than to the other."""
    learner = begun(ByGradient(HardConcrete(low=-0.5, high=1.1)), 1.0, torch.optim.AdamW)
    with torch.no_grad():
        learner.logits["w"][:] = torch.linspace(-2, 2, 200).view(20, 10)
    opened = learner.opened()["w"]
    assert torch.equal(opened, learner.mean_factor("w") > 0.5)
    assert 0 < int(opened.sum()) < int((learner.logits["w"] > 0).sum())
