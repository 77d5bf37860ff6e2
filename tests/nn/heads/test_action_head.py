"""Heads that guess actions: their losses by hand, and what they refuse to read."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightspan.core.errors import UserError
from lightspan.nn.heads.action_head import ActionHead, ContinuousActions, DiscreteActions
from lightspan.nn.heads.mlp_head import MLPHead
from lightspan.objectives.actions import action_figures


def batch(action: Any) -> dict[str, Any]:
    return {"image": torch.zeros(2, 1, 2, 2), "action": action}


def test_numbers_are_under_tanh_and_their_loss_is_the_mean_square() -> None:
    head = ContinuousActions(3, 2, hidden=())
    linear = head.mlp.layers[0]
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, math.atanh(0.5))
    guess = head(torch.randn(2, 3))
    torch.testing.assert_close(guess, torch.full((2, 2), 0.5))
    figures = action_figures(guess, torch.tensor([[0.5, 0.5], [-0.5, 1.0]]))
    torch.testing.assert_close(figures["loss"], torch.tensor(1.25 / 4))
    torch.testing.assert_close(figures["mean_absolute_error"], torch.tensor(1.5 / 4))
    assert next(iter(figures)) == "loss"


def test_numbered_actions_have_the_cross_entropy_in_nats() -> None:
    logits = torch.tensor([[0.0, 0, 0, 0], [0, math.log(3), 0, 0]])
    figures = action_figures(logits, torch.tensor([3, 1]))
    torch.testing.assert_close(figures["loss_nats"], torch.tensor((math.log(4) + math.log(2)) / 2))
    assert float(figures["accuracy"]) == 0.5
    assert next(iter(figures)) == "loss_nats"


def test_dropout_is_behind_each_hidden_layer_and_off_in_evaluation() -> None:
    mlp = MLPHead(4, 2, hidden=(8, 8), dropout=0.5)
    assert [type(part).__name__ for part in mlp.layers] == ["Linear", "GELU", "Dropout"] * 2 + ["Linear"]
    normed = MLPHead(4, 2, hidden=(8,), batch_norm=True)
    assert [type(part).__name__ for part in normed.layers] == ["Linear", "BatchNorm1d", "GELU", "Linear"]
    x = torch.randn(5, 4)
    assert not torch.equal(mlp(x), mlp(x))
    assert torch.equal(mlp.eval()(x), mlp(x))
    for wrong in (-0.1, 1.0):
        with pytest.raises(UserError, match="dropout"):
            MLPHead(4, 2, dropout=wrong)


@pytest.mark.parametrize("head", [ContinuousActions(3, 2), DiscreteActions(3, 4)])
def test_nothing_has_a_loss_of_zero_with_a_gradient(head: ActionHead) -> None:
    x = torch.zeros(0, 3)
    action = torch.zeros(0, 2) if isinstance(head, ContinuousActions) else torch.zeros(0, dtype=torch.int64)
    loss = next(iter(action_figures(head(x), action).values()))
    assert float(loss) == 0
    loss.backward()


def test_actions_out_of_range_or_of_another_kind_are_refused() -> None:
    numbers, numbered = ContinuousActions(3, 2), DiscreteActions(3, 4)
    limits = torch.tensor([[-1.0, 1], [0, 0]])
    assert numbers.read(batch(limits), "Tried") is limits
    assert numbered.read(batch(torch.tensor([0, 3])), "Tried").tolist() == [0, 3]
    for wrong in (
        torch.full((2, 2), 1.01), torch.full((2, 2), float("nan")), torch.zeros(2), torch.zeros(2, 3),
        torch.zeros(2, 2, dtype=torch.int64), torch.zeros(3, 2), None,
    ):  # fmt: skip
        with pytest.raises(UserError, match="action"):
            numbers.read(batch(wrong), "Tried")
    for wrong in (
        torch.tensor([0, 4]),
        torch.tensor([-1, 0]),
        torch.zeros(2),
        torch.zeros(2, 1).long(),
        torch.ones(()),
    ):
        with pytest.raises(UserError, match="action"):
            numbered.read(batch(wrong), "Tried")
    with pytest.raises(UserError, match="actions=0"):
        DiscreteActions(3, 0)
