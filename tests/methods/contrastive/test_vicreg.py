"""VICReg: one pass a view, its weights, and what it refuses."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import batch, fit

from lightspan.backbones.vision import SmallConvNet
from lightspan.core.errors import UserError
from lightspan.methods.contrastive.vicreg import VICReg
from lightspan.nn.heads.projector import Projector
from lightspan.objectives.vicreg import vicreg_loss


def method(**settings: Any) -> VICReg:
    torch.manual_seed(0)
    parts = {"backbone": SmallConvNet(width=4, stages=2), "projector": Projector(8, [16], 12)}
    return VICReg(**parts | settings, optimizer=partial(torch.optim.SGD, lr=0.02))


def two_views(rows: int = 8) -> dict[str, Any]:
    return batch(rows, locals_=0)


def test_the_loss_is_that_of_one_pass_a_view_with_its_weights_and_terms_are_logged() -> None:
    model, reference, given = method(covariance_weight=3.0), method(), two_views()
    logged: dict[str, Any] = {}
    model.log_training = logged.update  # type: ignore[method-assign]
    z1, z2 = (reference.projector(reference.backbone(view)) for view in given["views"])
    loss = model.training_step(given, 0)
    torch.testing.assert_close(loss, vicreg_loss(z1, z2, 25.0, 25.0, 3.0))
    again = 25 * logged["train/invariance"] + 25 * logged["train/variance"] + 3 * logged["train/covariance"]
    torch.testing.assert_close(again, loss)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_training_lowers_the_loss_and_without_the_variance_term_embeddings_shrink(tmp_path: Path) -> None:
    spreads = []
    for weight in (25.0, 0.0):
        model, given = method(variance_weight=weight), two_views(16)
        losses = fit(model, [given] * 20, tmp_path)
        assert losses[-1] < losses[0]
        spreads.append(model.projector(model.backbone(given["views"][0])).std(dim=0).mean())
    assert spreads[1] < 0.5 * spreads[0]


def test_what_it_cannot_train_is_refused() -> None:
    for name in ("invariance_weight", "variance_weight", "covariance_weight"):
        with pytest.raises(UserError, match=rf"{name}=-1.0.* must be at least 0 and finite"):
            method(**{name: -1.0})
    with pytest.raises(UserError, match=r"projector.in_features=9, but SmallConvNet gives 8"):
        method(projector=Projector(9, [16], 12))
    with pytest.raises(UserError, match=r"VICReg needs 2 views"):
        method().training_step(batch(), 0)
