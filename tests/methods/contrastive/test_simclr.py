"""SimCLR: the loss of both views of all images, its recipe's network, and what it refuses."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import batch, fit

from lightspan.backbones.vision import SmallConvNet
from lightspan.cli.config.resolve import resolve
from lightspan.core.errors import UserError
from lightspan.methods.contrastive.simclr import SimCLR
from lightspan.nn.heads.projector import Projector
from lightspan.objectives.info_nce import nt_xent


def method(**settings: Any) -> SimCLR:
    torch.manual_seed(0)
    parts = {"backbone": SmallConvNet(width=4, stages=2), "projector": Projector(8, [16], 6)}
    return SimCLR(**parts | settings, optimizer=partial(torch.optim.SGD, lr=0.05))


def two_views(rows: int = 6, seed: int = 1) -> dict[str, Any]:
    return batch(rows, seed, locals_=0)


def test_the_loss_is_nt_xent_of_one_pass_over_both_views() -> None:
    model, reference, given = method(), method(), two_views()
    model.log_training = lambda figures: None  # type: ignore[method-assign]
    z_RD = reference.projector(reference.backbone(torch.cat(given["views"])))
    loss = model.training_step(given, 0)
    torch.testing.assert_close(loss, nt_xent(z_RD[:6], z_RD[6:], 0.5))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_training_lowers_the_loss_and_features_come_from_before_the_projector(tmp_path: Path) -> None:
    model, given = method(), two_views(12)
    losses = fit(model, [given] * 12, tmp_path)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    model.eval()
    assert torch.equal(model.features(given), model.backbone(given["views"][0]))
    assert torch.equal(model.features({"image": given["views"][0]}), model.features(given))


def test_what_it_cannot_train_is_refused() -> None:
    with pytest.raises(UserError, match=r"temperature=0.0 must be above 0"):
        method(temperature=0.0)
    with pytest.raises(UserError, match=r"projector.in_features=9, but SmallConvNet gives 8 features; set it to 8"):
        method(projector=Projector(9, [16], 6))
    with pytest.raises(UserError, match=r"SimCLR needs 2 views of each image, and this batch gives 5"):
        method().training_step(batch(), 0)


def test_the_small_recipes_of_this_family_share_network_data_and_epochs() -> None:
    """So that what differs between their figures is the method."""
    first, *others = (resolve(f"contrastive/{name}").config for name in ("simclr", "moco", "vicreg", "barlow_twins"))
    for other in others:
        assert other["data"] == first["data"]
        assert other["trainer"]["max_epochs"] == first["trainer"]["max_epochs"]
        assert other["model"]["init_args"]["backbone"] == first["model"]["init_args"]["backbone"]
