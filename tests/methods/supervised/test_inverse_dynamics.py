"""Inverse dynamics: its loss by hand, what goes through which image, and what a linear world lets it learn."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import fit
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.vision import MLP
from lightspan.core.errors import UserError
from lightspan.methods.supervised.inverse_dynamics import InverseDynamics
from lightspan.nn.heads.action_head import ContinuousActions, DiscreteActions

SGD = partial(torch.optim.SGD, lr=0.1)


def method(numbered: bool = False, optimizer: Any = SGD, **settings: Any) -> InverseDynamics:
    torch.manual_seed(0)
    kind = partial(DiscreteActions, actions=3) if numbered else partial(ContinuousActions, actions=2)
    return InverseDynamics(MLP((1, 4, 4), (6,)), kind(12, hidden=(8,), dropout=0.0), optimizer=optimizer, **settings)


def batch(rows: int = 5, numbered: bool = False, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    image, later = (torch.randn(rows, 1, 4, 4, generator=generator) for _ in range(2))
    action = torch.arange(rows) % 3 if numbered else 2 * torch.rand(rows, 2, generator=generator) - 1
    return {"image": image, "next_image": later, "action": action, "index": torch.arange(rows)}


def test_the_loss_is_that_of_the_head_on_the_codes_of_both_images_in_their_order() -> None:
    for numbered in (False, True):
        model, given = method(numbered), batch(numbered=numbered)
        codes = torch.cat([model.backbone(given["image"]), model.backbone(given["next_image"])], dim=1)
        guess = model.head(codes)
        wanted = F.cross_entropy if numbered else F.mse_loss
        torch.testing.assert_close(model.training_step(given, 0), wanted(guess, given["action"]))
        assert torch.equal(model.features(given), model.backbone(given["image"]))


def gradient(model: InverseDynamics, loss: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, [*model.backbone.parameters()])])


def test_the_gradient_is_the_sum_over_both_images_and_stop_next_leaves_out_the_later_one() -> None:
    both, first, given = method(), method(stop_next=True), batch()
    now, later = both.backbone(given["image"]), both.backbone(given["next_image"])
    parts = [
        gradient(both, F.mse_loss(both.head(torch.cat(codes, dim=1)), given["action"]))
        for codes in ((now, later.detach()), (now.detach(), later))
    ]
    losses = both.training_step(given, 0), first.training_step(given, 0)
    assert torch.equal(*losses)
    torch.testing.assert_close(gradient(both, losses[0]), parts[0] + parts[1])
    torch.testing.assert_close(gradient(first, losses[1]), parts[0])
    assert parts[1].abs().max() > 1e-4


def test_pictures_that_stand_still_tell_no_more_than_the_mean_action() -> None:
    model, given = method(), batch(40)
    given["image"] = given["next_image"] = given["image"][:1].expand(40, -1, -1, -1)
    assert model.training_step(given, 0) >= given["action"].var(dim=0, correction=0).mean()


class Difference(ContinuousActions):
    """What the later code has more than the first."""

    def forward(self, x_BF: Tensor) -> Tensor:
        first_BA, later_BA = x_BF.chunk(2, dim=1)
        return later_BA - first_BA


def test_in_a_linear_world_a_code_by_the_inverse_of_what_actions_do_has_no_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    reach, image = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((6, 2), (50, 6)))
    action = 2 * torch.rand(50, 2, generator=generator, dtype=torch.float64) - 1
    given = {"image": image, "next_image": image + action @ reach.T, "action": action}
    code = nn.Linear(6, 2).double()
    model = InverseDynamics(code, Difference(4, 2), optimizer=SGD)
    inverse = torch.linalg.pinv(reach)
    for weight, share in ((inverse, 0.0), (inverse * 0, 1.0), (inverse * 3, 4.0)):  # of the mean square of the actions
        code.weight.data = weight
        torch.testing.assert_close(model.training_step(given, 0), share * action.square().mean())


def test_training_finds_the_actions(tmp_path: Path) -> None:
    given = batch(64)
    moved = F.pad(given["action"], (0, 14)).view(64, 1, 4, 4)
    given["next_image"] = given["image"] + moved
    losses = fit(method(optimizer=partial(torch.optim.AdamW, lr=1e-2)), [given] * 60, tmp_path)
    assert losses[-1] < 0.3 * losses[0]


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(UserError, match=r"head\.in_features=6"):
        InverseDynamics(MLP((1, 4, 4), (6,)), ContinuousActions(6, 2), optimizer=SGD)
    given = batch()
    for name, wrong in (
        ("next_image", None),
        ("next_image", given["image"][:, :, :3]),
        ("next_image", given["image"].double()),
        ("action", given["action"] * 3),
        ("action", None),
    ):
        with pytest.raises(UserError, match=name):
            method().training_step(given | {name: wrong}, 0)
    with pytest.raises(UserError, match="action"):  # before it goes to a device
        method()._on_before_batch_transfer(given | {"action": given["action"] * 3})


def test_one_row_and_bfloat16_have_finite_gradients() -> None:
    model = method().bfloat16()
    given = {name: rows[:1].bfloat16() if rows.is_floating_point() else rows[:1] for name, rows in batch().items()}
    loss = model.training_step(given, 0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert isinstance(model.backbone, nn.Module)
