"""Masks by score, step by step, without a Trainer."""

import torch
from torch import nn

from lightspan.optim.masks.by_score import ByScore
from lightspan.optim.masks.place import Place
from lightspan.subspaces.masks.allocation import Uniform
from lightspan.subspaces.masks.schedules import Constant
from lightspan.subspaces.masks.scores import Movement, Score
from lightspan.subspaces.masks.top_k import top_k


def begun(learner: ByScore, weight: nn.Parameter, density: float) -> ByScore:
    learner.begin({"w": Place("w", weight)}, Uniform(), Constant(density), 0)
    return learner


def step(learner: ByScore, weight: nn.Parameter, number: int, rate: float, gradient: torch.Tensor) -> None:
    learner.draw(number - 1, 0.0)
    weight.grad = gradient.clone()
    weight.grad.copy_(learner.pull("w", weight.grad))
    with torch.no_grad():
        weight -= rate * weight.grad
    learner.update(number, 0.0)


def test_magnitude_keeps_the_largest_weights_of_the_moment_not_those_of_the_step_before() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(20, 20, generator=generator))
    learner = begun(ByScore(every=2), weight, 0.3)
    for number in range(1, 4):
        step(learner, weight, number, 0.4, torch.randn(20, 20, generator=generator))
        if number == 2:
            assert torch.equal(learner.masks["w"], top_k(weight.abs(), 120))
    assert torch.equal(learner.chosen(1.0)["w"], top_k(weight.abs(), 120))
    assert not torch.equal(learner.chosen(1.0)["w"], learner.masks["w"])


def test_a_sum_of_movements_has_the_weights_that_the_gradients_were_taken_at() -> None:
    weight = nn.Parameter(torch.tensor([2.0, 1.0]))
    learner = begun(ByScore(Movement(), memory=0.5), weight, 1.0)
    step(learner, weight, 1, 1.0, torch.tensor([3.0, -1.0]))
    assert weight.tolist() == [-1.0, 2.0]
    assert learner.scores["w"].tolist() == [-6.0, 1.0]
    step(learner, weight, 2, 1.0, torch.tensor([1.0, 1.0]))
    assert learner.scores["w"].tolist() == [0.5 * -6 + 1, 0.5 * 1 - 2]


class OfTheWeight(Score):
    def of(self, weight_S: torch.Tensor, gradient_S: torch.Tensor) -> torch.Tensor:
        return weight_S


def test_a_score_may_be_the_weight_itself() -> None:
    weight = nn.Parameter(torch.tensor([2.0, 1.0]))
    learner = begun(ByScore(OfTheWeight(), memory=1.0), weight, 1.0)
    step(learner, weight, 1, 1.0, torch.tensor([3.0, -1.0]))
    step(learner, weight, 2, 1.0, torch.tensor([0.0, 0.0]))
    assert learner.scores["w"].tolist() == [2.0 - 1.0, 1.0 + 2.0]
