"""Optimisers follow an index set: what they keep for closed entries vanishes."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer, RMSprop

from lightspan.core.errors import UserError
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.masks.follow import keep_only, require_entrywise


def stepped(make, shape=(4, 3)) -> tuple[Optimizer, nn.Parameter]:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    optimizer = make([weight])
    for _ in range(3):
        weight.grad = torch.randn(shape)
        optimizer.step()
    return optimizer, weight


@pytest.mark.parametrize(
    ("make", "moments"),
    [
        (lambda p: AdamW(p), {"exp_avg", "exp_avg_sq"}),
        (lambda p: Adam(p, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer"}),
        (lambda p: RMSprop(p, momentum=0.9), {"square_avg", "momentum_buffer"}),
        (lambda p: SGD(p, lr=0.1), set()),
    ],
)
def test_moments_of_closed_entries_vanish_and_others_stay(make, moments: set[str]) -> None:
    optimizer, weight = stepped(make)
    require_entrywise(optimizer)
    opened = torch.rand(weight.shape) < 0.5
    before = {key: value.clone() for key, value in optimizer.state[weight].items() if key in moments}
    assert before.keys() == moments
    steps = optimizer.state[weight].get("step")
    keep_only(optimizer, weight, opened)
    for key, value in before.items():
        assert torch.equal(optimizer.state[weight][key], value * opened)
    assert steps is None or optimizer.state[weight]["step"] == 3


def test_a_moment_that_is_not_finite_vanishes_too() -> None:
    optimizer, weight = stepped(AdamW)
    optimizer.state[weight]["exp_avg"][0] = torch.nan
    keep_only(optimizer, weight, torch.zeros(weight.shape, dtype=torch.bool))
    assert not optimizer.state[weight]["exp_avg"].any()


def test_nothing_is_kept_before_the_first_step() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    keep_only(AdamW([weight]), weight, torch.ones(2, 2, dtype=torch.bool))


def test_moments_in_coordinates_stay_and_those_of_a_vector_follow() -> None:
    optimizer, weight = stepped(lambda p: LowRank(p, rank=2))
    before = {key: value.clone() for key, value in optimizer.state[weight].items() if isinstance(value, torch.Tensor)}
    keep_only(optimizer, weight, torch.zeros(weight.shape, dtype=torch.bool))
    assert before
    assert all(torch.equal(optimizer.state[weight][key], value) for key, value in before.items())
    matrix = nn.Parameter(torch.randn(4, 3))  # LowRank wants one
    optimizer, vector = stepped(lambda p: LowRank([*p, matrix], rank=2), shape=(5,))
    keep_only(optimizer, vector, torch.tensor([True, False, True, True, False]))
    assert (optimizer.state[vector]["exp_avg"] != 0).tolist() == [True, False, True, True, False]


class Blocks(Optimizer):
    """Of the user's own: keeps integers in place of moments."""

    def __init__(self, params, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["codes"] = torch.zeros(p.shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Adafactor, r"Adafactor keeps 'row_var' of shape \(2, 1\) and torch.float32 for a weight of shape \(2, 3\)"),
        (Blocks, r"Blocks keeps 'codes' of shape \(2, 3\) and torch.uint8"),
        (torch.optim.LBFGS, "LBFGS evaluates the loss several times a step"),
    ],
)
def test_state_that_cannot_follow_is_refused(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        require_entrywise(make([nn.Parameter(torch.ones(2, 3))]))
