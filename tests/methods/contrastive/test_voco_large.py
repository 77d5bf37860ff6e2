"""VoCo-L: its step written out, what reaches the backbone, what is dropped, and a batch of one."""

from functools import partial
from typing import Any

import pytest
import torch
from method_cases import base_crops
from method_runs import Pooled
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.methods.contrastive.voco_large import VoCoLarge
from lightspan.nn.heads.projector import Projector
from lightspan.objectives.overlaps import base_similarities, positive_cosines, split_overlap_loss


def method(**settings: Any) -> tuple[VoCoLarge, dict[str, Tensor]]:
    """With a teacher that is not the student; and the figures that a step logs."""
    torch.manual_seed(0)
    model = VoCoLarge(
        Pooled(), Projector(8, [10], 6, hidden_norm=False), optimizer=partial(torch.optim.SGD, lr=0.1), **settings
    )
    model.teacher.follow(Projector(8, [10], 6, hidden_norm=False), 0.5)
    figures: dict[str, Tensor] = {}
    model.log_training = figures.update  # type: ignore[method-assign, assignment]
    return model, figures


def test_the_losses_are_those_of_each_volume_written_out() -> None:
    model, figures = method(drop=0.0)
    given = base_crops(4, 0)
    model.training_step(given, 0)
    z, t = (
        torch.stack([head(model.backbone(view)) for view in given["views"]], dim=1)
        for head in (model.projector, model.teacher)
    )
    other_z, other_t = z[[1, 2, 3, 0]], t[[1, 2, 3, 0]]
    within = [split_overlap_loss(given["overlap"][[i]], positive_cosines(z[[i], 3:], t[[i], :3])) for i in range(4)]
    across = [
        split_overlap_loss(
            positive_cosines(t[[i], 3:], other_t[[i], :3]), positive_cosines(z[[i], 3:], other_z[[i], :3])
        )
        for i in range(4)
    ]
    torch.testing.assert_close(figures["train/within"], torch.stack(within).mean())
    torch.testing.assert_close(figures["train/across"], torch.stack(across).mean())
    torch.testing.assert_close(figures["train/bases"], base_similarities(z[:, :3], z[:, :3]).square().mean())
    whole = sum(figures[f"train/{name}"] for name in ("within", "across", "bases"))
    torch.testing.assert_close(figures["train/loss"], whole)


def test_no_gradient_passes_the_teacher() -> None:
    model, figures = method(drop=0.0)
    given = base_crops(4, 0)
    views = [view.requires_grad_() for view in given["views"]]
    model.training_step(given | {"views": views}, 0)
    within = torch.autograd.grad(figures["train/within"], views, allow_unused=True, retain_graph=True)
    assert all(not grad.any() for grad in within[:3])
    assert all(grad.any() for grad in within[3:])
    figures["train/across"].backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_where_both_heads_agree_the_loss_across_is_0() -> None:
    model, figures = method(drop=0.0)
    model.teacher.follow(model.projector, 0.0)
    model.training_step(base_crops(4, 0), 0)
    assert figures["train/across"].detach() < 1e-6


def test_whole_crops_are_dropped_or_single_features_as_often_as_set() -> None:
    features, index = torch.ones(5 * 800, 8), torch.arange(800)
    crops, single = (method(drops=drops)[0].thinned(features, index) for drops in ("crops", "features"))
    for kept in (crops, single):
        assert {0.0, 1.25} == set(kept.unique().tolist())
        assert float((kept == 0).float().mean()) == pytest.approx(0.2, abs=0.02)  # 3 deviations of 4,000 draws
    assert ((crops == 0).all(dim=1) | (crops > 0).all(dim=1)).all()
    assert ((single == 0).any(dim=1) & (single > 0).any(dim=1)).any()
    # A volume's are its own, whatever it comes with.
    half = method()[0].thinned(features[: 5 * 400], index[400:])
    torch.testing.assert_close(half, crops.unflatten(0, (5, 800))[:, 400:].flatten(0, 1))


def test_a_single_volume_has_no_loss_across() -> None:
    model, figures = method()
    loss = model.training_step(base_crops(1, 0), 0)
    assert "train/across" not in figures
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.projector.parameters())


def test_what_is_wrong_is_named() -> None:
    for settings, said in (({"momentum": -1.0}, "momentum=-1"), ({"drop": 1.0}, "drop=1")):
        with pytest.raises(UserError, match=said):
            method(**settings)
    with pytest.raises(UserError, match="VoCoLarge needs base crops"):
        method()[0].training_step({"views": base_crops(4, 0)["views"], "index": torch.arange(4)}, 0)
