"""Behaviour cloning: its loss by hand, and a code that was trained before and stays."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import fit
from torch.nn import functional as F

from lightspan.backbones.vision import MLP
from lightspan.core.errors import UserError
from lightspan.methods.supervised.behaviour_cloning import BehaviourCloning
from lightspan.nn.heads.action_head import ContinuousActions, DiscreteActions
from lightspan.nn.teachers.frozen import Frozen


def method(numbered: bool = False, frozen: bool = False) -> BehaviourCloning:
    torch.manual_seed(0)
    backbone: Any = MLP((1, 4, 4), (6,))
    kind = partial(DiscreteActions, actions=3) if numbered else partial(ContinuousActions, actions=2)
    head = kind(6, hidden=(8,), dropout=0.0)
    return BehaviourCloning(Frozen(backbone) if frozen else backbone, head, optimizer=partial(torch.optim.SGD, lr=0.1))


def batch(rows: int = 5, numbered: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    action = torch.arange(rows) % 3 if numbered else 2 * torch.rand(rows, 2, generator=generator) - 1
    image = torch.randn(rows, 1, 4, 4, generator=generator)
    return {"image": image, "action": action, "index": torch.arange(rows)}


def test_the_loss_is_that_of_what_the_policy_does() -> None:
    for numbered in (False, True):
        model, given = method(numbered), batch(numbered=numbered)
        guess = model.predict_step(given, 0)
        wanted = F.cross_entropy if numbered else F.mse_loss
        torch.testing.assert_close(model.training_step(given, 0), wanted(guess, given["action"]))
        torch.testing.assert_close(guess, model.head(model.features(given)))


def test_a_frozen_code_stays_while_its_policy_learns(tmp_path: Path) -> None:
    model = method(frozen=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = fit(model, [batch()] * 20, tmp_path)
    assert losses[-1] < losses[0]
    changed = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"head"}


def test_what_cannot_be_trained_is_refused() -> None:
    for backbone in (MLP((1, 4, 4), (6,)), Frozen(MLP((1, 4, 4), (6,)))):
        with pytest.raises(UserError, match=r"head\.in_features=5"):
            BehaviourCloning(backbone, ContinuousActions(5, 2), optimizer=torch.optim.SGD)
    for wrong in ({"action": torch.full((5, 2), 2.0)}, {"action": torch.zeros(4, 2)}):
        with pytest.raises(UserError, match="action"):
            method().training_step(batch() | wrong, 0)
        with pytest.raises(UserError, match="action"):
            method()._on_before_batch_transfer(batch() | wrong)
