"""LeJEPA: its two terms written out, against lightly, and what it refuses."""

from functools import partial
from typing import Any

import pytest
import torch
from method_runs import batch

from lightspan.backbones.vision import SmallConvNet
from lightspan.cli.config.resolve import resolve
from lightspan.core.errors import UserError
from lightspan.methods.contrastive.lejepa import LeJEPA, distance_from_centre
from lightspan.nn.heads.projector import Projector
from lightspan.objectives import sigreg as objective
from lightspan.objectives.sigreg import sigreg


def method(**settings: Any) -> LeJEPA:
    torch.manual_seed(0)
    parts = {"backbone": SmallConvNet(width=4, stages=2), "projector": Projector(8, [16], 6), "directions": 20}
    return LeJEPA(**parts | settings, optimizer=partial(torch.optim.SGD, lr=0.02))


def test_the_loss_is_the_distance_from_the_mean_of_the_global_views_and_the_mean_of_sigreg_over_views() -> None:
    model, reference, given = method(lam=0.3, seed=4), method(), batch()
    model.log_training = lambda figures: None  # type: ignore[method-assign]
    large, small = torch.cat(given["views"][:2]), torch.cat(given["views"][2:])
    rows = torch.cat([reference.backbone(large), reference.backbone(small)])
    z = reference.projector(rows).view(5, 6, 6)
    centre = (z[0] + z[1]) / 2
    distance = sum((view - centre).square().mean() for view in z) / 5
    gauss = sum(sigreg(view[None], 4, 0, 20) for view in z) / 5
    loss = model.training_step(given, 0)
    torch.testing.assert_close(loss, 0.7 * distance + 0.3 * gauss)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_lightly_has_the_same_loss_for_the_same_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = pytest.importorskip("lightly.loss", reason="the extra `peers` is not installed")
    theirs = peers.LeJEPALoss(lambda_param=0.1, sigreg_num_vectors=7)
    monkeypatch.setattr(theirs.sigreg, "_generate_unit_vectors", lambda *_: objective.random_directions(5, 7, 0, 0))
    z = torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(0))
    expected = theirs(global_proj=z[:2], local_proj=z[2:])
    loss = 0.9 * distance_from_centre(z, 2) + 0.1 * sigreg(z, 0, 0, 7)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_directions_are_a_function_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = method().eval(), batch()
    model.log_training = lambda figures: None  # type: ignore[method-assign]
    first, again = model.training_step(given, 0), model.training_step(given, 0)
    assert torch.equal(first, again)
    monkeypatch.setattr(LeJEPA, "global_step", 1)
    assert not torch.equal(model.training_step(given, 0), first)


def test_what_it_cannot_train_is_refused() -> None:
    with pytest.raises(UserError, match=r"lam=1.5 must lie in \[0, 1\]"):
        method(lam=1.5)
    with pytest.raises(UserError, match="global_views=0 must"):
        method(global_views=0)
    with pytest.raises(UserError, match=r"the first global_views=6 are global, and this batch has 5"):
        method(global_views=6).training_step(batch(), 0)


def test_the_recipe_of_a_resnet_has_the_rate_and_the_decay_that_the_authors_advise_for_resnets() -> None:
    model = resolve("contrastive/lejepa_imagenet").config["model"]["init_args"]
    assert model["backbone"]["init_args"]["name"] == "resnet50"
    assert model["optimizer"]["init_args"] == {"lr": 5e-4, "weight_decay": 5e-4}
