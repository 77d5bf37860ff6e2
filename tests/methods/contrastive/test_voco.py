"""VoCo: its step written out, where gradients go, and batches with nothing to see."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import base_crops
from method_runs import Pooled, averages, fit, moved, stays_finite
from torch.nn import functional as F

from lightspan.backbones.dense import PooledMaps, UNetEncoder
from lightspan.core.errors import UserError
from lightspan.datamodules.volume.phantoms import Phantoms
from lightspan.methods.contrastive.voco import VoCo
from lightspan.nn.heads.projector import Projector


def method(**settings: Any) -> VoCo:
    torch.manual_seed(0)
    model = VoCo(
        Pooled(), Projector(8, [10], 6, hidden_norm=False), optimizer=partial(torch.optim.SGD, lr=0.1), **settings
    )
    model.log_training = lambda figures: None  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_the_loss_is_that_of_the_paper_written_out(momentum: float | None) -> None:
    model, given = method(momentum=momentum, bases_weight=0.5), base_crops(4, 0)
    if model.teacher is not None:
        moved(model)
    losses = []
    for row in range(4):
        z = [model.student(view[row : row + 1])[0] for view in given["views"]]
        t = z if model.teacher is None else [model.teacher(view[row : row + 1])[0] for view in given["views"]]
        cosines = [[F.cosine_similarity(a, b, dim=0).relu() for b in z[:3]] for a in z[:3]]
        losses.append(0.5 * (cosines[0][1] + cosines[0][2] + cosines[1][2]) / 3)
        for m in range(2):
            for k in range(3):
                own, other = ((F.cosine_similarity(a[3 + m], b[k], dim=0).relu()) for a, b in ((z, t), (t, z)))
                wrong = (given["overlap"][row, m, k] - (own + other) / 2).abs()
                losses[-1] = losses[-1] - (1 - wrong).log() / 6
    torch.testing.assert_close(model.training_step(given, 0), torch.stack(losses).mean(), rtol=1e-4, atol=1e-6)


def test_base_crops_get_no_gradient_from_places_without_a_teacher() -> None:
    model, given = method(bases_weight=0.0), base_crops(4, 0)
    views = [view.requires_grad_() for view in given["views"]]
    model.training_step(given | {"views": views}, 0).backward()
    assert all(not view.grad.any() for view in views[:3])
    assert all(view.grad.any() for view in views[3:])


def test_the_order_of_base_crops_does_not_matter() -> None:
    model, given = method(), base_crops(4, 0)
    order = [2, 0, 1]
    turned = {"views": [given["views"][at] for at in [*order, 3, 4]], "overlap": given["overlap"][:, :, order]}
    torch.testing.assert_close(model.training_step(given | turned, 0), model.training_step(given, 0))


def test_the_teacher_is_the_average_of_the_student(tmp_path: Path) -> None:
    model = method(momentum=0.9)
    assert averages(model, [base_crops(4, seed) for seed in range(3)], tmp_path) == [0.9] * 3


def test_drawn_volumes_train_it_and_constant_ones_leave_it_finite(tmp_path: Path) -> None:
    data = Phantoms(patients=4, cuts=8, side=16, size=8, bases=(1, 2, 2), crops=2, batch_size=3, val_size=1)
    data.setup()
    (given,) = data.train_dataloader()
    network = PooledMaps(UNetEncoder(1, 4, 2, axes=3))
    model = VoCo(network, Projector(network.num_features, [8], 8), optimizer=partial(torch.optim.AdamW, lr=0.01))
    losses = fit(model, [given] * 12, tmp_path)
    assert losses[-1] < 0.8 * losses[0]
    assert model.features(given).shape == (3, network.num_features)
    flat = given | {"views": [torch.full_like(view, 0.5) for view in given["views"]]}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        stays_finite(model, [flat, flat], tmp_path, precision=precision)


def test_what_is_wrong_is_named() -> None:
    given = base_crops(4, 0)
    lacking = {name: given[name] for name in ("views", "index")}
    for wrong in (
        lacking,
        given | {"overlap": given["overlap"][:3]},
        given | {"overlap": given["overlap"][:, :1]},
        given | {"overlap": given["overlap"].long()},
        given | {"overlap": torch.zeros(4, 0, 5)},
    ):
        with pytest.raises(UserError, match="VoCo needs base crops"):
            method().training_step(wrong, 0)
    with pytest.raises(UserError, match="views of one size"):
        method().training_step(given | {"views": [*given["views"][:4], torch.zeros(4, 1, 4, 4)]}, 0)
    for settings, said in (({"momentum": 1.5}, "momentum=1.5"), ({"bases_weight": -1.0}, "bases_weight=-1")):
        with pytest.raises(UserError, match=said):
            method(**settings)
