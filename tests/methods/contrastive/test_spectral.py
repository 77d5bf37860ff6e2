"""SpectralContrastive: its loss with several heads, what probes read, and what it refuses."""

from functools import partial
from typing import Any

import pytest
import torch
from method_runs import Pooled, batch
from torch import nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.methods.contrastive.spectral import SpectralContrastive
from lightspan.nn.heads.reweighting import ReweightingHead
from lightspan.objectives.spectral import spectral_contrastive


def method(projector: nn.Module | None = None, **settings: Any) -> SpectralContrastive:
    torch.manual_seed(0)
    built = SpectralContrastive(
        Pooled(), projector or nn.Linear(8, 6), **settings, optimizer=partial(torch.optim.SGD, lr=0.05)
    )
    built.log_training = lambda figures: None  # type: ignore[method-assign]
    return built


def test_the_loss_is_that_of_both_views_through_backbone_and_head() -> None:
    model, given = method(), batch(locals_=0)
    z1, z2 = (model.projector(model.backbone(view)) for view in given["views"])
    torch.testing.assert_close(model.training_step(given, 0), spectral_contrastive(z1, z2))
    model.length = 2.0
    scaled = spectral_contrastive(*(2 * F.normalize(z, dim=1) for z in (z1, z2)))
    torch.testing.assert_close(model.training_step(given, 0), scaled)


def test_a_fixed_head_of_equal_weights_trains_as_none_does() -> None:
    fixed, none, given = method(ReweightingHead(8, kappa=1.0)), method(nn.Identity()), batch(locals_=0)
    for model in (fixed, none):
        model.training_step(given, 0).backward()
    pairs = [*zip(fixed.parameters(), none.parameters(), strict=True)]
    assert pairs
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs)  # type: ignore[arg-type]


def test_probes_read_the_backbone_whatever_the_head() -> None:
    given = batch(locals_=0)
    model = method(ReweightingHead(8, kappa=1.3))
    assert torch.equal(model.features(given), model.backbone(given["views"][0]))
    assert torch.equal(model.embeddings(given), model.projector(model.features(given)))


def test_what_it_cannot_train_is_refused() -> None:
    with pytest.raises(UserError, match=r"projector.in_features=5, but Pooled gives 8 features"):
        method(nn.Linear(5, 6))
    for length in (0.0, -1.0, float("inf")):
        with pytest.raises(UserError, match=r"length=\S+ must be above 0"):
            method(length=length)
    with pytest.raises(UserError, match=r"SpectralContrastive needs 2 views of each image, and this batch gives 5"):
        method().training_step(batch(), 0)
