"""MMC: each term by hand, alone it is the method it came from; teacher and corruption."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import numpy as np
import pytest
import torch
from method_runs import batch, fit, moved
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.distillation import mmc
from lightspan.methods.distillation.mmc import MMC
from lightspan.nn.heads.dino_head import DINOHead
from lightspan.nn.heads.projector import Projector
from lightspan.nn.masking.block_masks import MaskedPatches
from lightspan.nn.masking.corruption import GroupCorruption
from lightspan.nn.sequences.patches import patchify
from lightspan.objectives.prototypes import centred_softmax
from lightspan.optim.schedules import cosine_between

BATCHES = [batch(seed=seed, locals_=0) for seed in range(4)]
ALONE = {"reconstruction": 0.0, "distillation": 0.0, "contrast": 0.0}


def method(projector: nn.Module | None = None, **settings: Any) -> MMC:
    torch.manual_seed(0)
    backbone = vit(width=16, depth=2, heads=4, img_size=8, patch_size=2, in_chans=1)
    given = {
        "momentum": 0.5, "freeze_prototypes": 0.0, "corruption": GroupCorruption(alien=0.0),
        "optimizer": partial(torch.optim.SGD, lr=0.05),
    }  # fmt: skip
    head, decoder = DINOHead(16, 9, hidden=(12,), bottleneck=6), nn.Linear(16, 4)
    return MMC(backbone, projector or nn.Linear(16, 8), nn.Linear(8, 8), head, decoder, **given | settings)


class Seen:
    """Tokens of both networks, view by view."""

    def __init__(self, model: MMC, given: dict[str, Any]) -> None:
        views, index = given["views"], given["index"]
        pairs = [model.corruption(view, (4, 4), index, 0, number) for number, view in enumerate(views)]
        self.masks = [torch.from_numpy(masks).flatten(1) for _, masks in pairs]
        self.student = [model.student.backbone.tokens(image) for image, _ in pairs]
        self.teacher = [model.teacher.module.backbone.tokens(view) for view in views]


def mean_over_images(rows_RT: Tensor, mask_RT: Tensor) -> Tensor:
    """Of each image over its masked patches, then over images."""
    return torch.stack(
        [row[mask].mean() if mask.any() else row.sum() * 0 for row, mask in zip(rows_RT, mask_RT, strict=True)]
    ).mean()


def test_alone_the_reconstruction_is_the_mean_error_of_corrupted_pixels() -> None:
    model, given = moved(method(**ALONE | {"reconstruction": 2.0})), batch(locals_=0)
    seen = Seen(model, given)
    errors = [
        (model.decoder(tokens[:, 1:]) - patchify(view, (2, 2))).abs().mean(dim=2)
        for tokens, view in zip(seen.student, given["views"], strict=True)
    ]
    expected = 2 * mean_over_images(torch.cat(errors), torch.cat(seen.masks))
    torch.testing.assert_close(model.training_step(given, 0), expected)


def test_alone_the_distillation_is_ibots_of_patches() -> None:
    model, given = moved(method(**ALONE | {"distillation": 1.0})), batch(locals_=0)
    seen, centre = Seen(model, given), model.centre().clone()
    rows = []
    for student, teacher in zip(seen.student, seen.teacher, strict=True):
        taught, guessed = model.teacher.module.head(teacher[:, 1:]), model.student.head(student[:, 1:])
        targets = centred_softmax(taught.flatten(0, 1), centre, 0.04).view_as(taught)
        rows.append(-(targets * (guessed / 0.1).log_softmax(dim=-1)).sum(dim=-1))
    torch.testing.assert_close(model.training_step(given, 0), mean_over_images(torch.cat(rows), torch.cat(seen.masks)))


def test_alone_the_contrast_is_moco_v3s_between_views() -> None:
    model, given = moved(method(**ALONE | {"contrast": 1.0})), batch(locals_=0)
    seen = Seen(model, given)
    q1, q2 = (F.normalize(model.predictor(model.student.projector(tokens[:, 0])), dim=1) for tokens in seen.student)
    k1, k2 = (F.normalize(model.teacher.module.projector(tokens[:, 0]), dim=1) for tokens in seen.teacher)
    own = torch.arange(6)
    expected = (F.cross_entropy(q1 @ k2.T / 0.2, own) + F.cross_entropy(q2 @ k1.T / 0.2, own)) / 2
    torch.testing.assert_close(model.training_step(given, 0), expected)


def test_norms_of_the_projector_see_the_batch_in_the_teacher_too() -> None:
    model, given = moved(method(**ALONE | {"contrast": 1.0}, projector=Projector(16, [12], 8))), batch(locals_=0)
    assert any(isinstance(module, nn.BatchNorm1d) for module in model.teacher.modules())
    seen, own = Seen(model, given), torch.arange(6)
    networks = model.student.projector, model.teacher.module.projector
    q, k = (
        copy.deepcopy(network).train()(torch.cat([tokens[:, 0] for tokens in views]))
        for network, views in zip(networks, (seen.student, seen.teacher), strict=True)
    )
    (q1, q2), (k1, k2) = F.normalize(model.predictor(q), dim=1).chunk(2), F.normalize(k, dim=1).chunk(2)
    expected = (F.cross_entropy(q1 @ k2.T / 0.2, own) + F.cross_entropy(q2 @ k1.T / 0.2, own)) / 2
    torch.testing.assert_close(model.training_step(given, 0), expected)


def test_the_loss_is_the_weighted_sum_and_pixels_that_were_not_corrupted_have_no_say_in_the_reconstruction() -> None:
    weights = {"reconstruction": 0.5, "distillation": 2.0, "contrast": 3.0}
    model, given = moved(method(**weights)), batch(locals_=0)
    alone = [moved(method(**ALONE | {name: weight})).training_step(given, 0) for name, weight in weights.items()]
    torch.testing.assert_close(model.training_step(given, 0), sum(alone))
    masks = np.zeros((12, 4, 4), dtype=bool)
    masks[:, 1] = True
    masked, clean = MaskedPatches.of(masks), torch.cat(given["views"])
    guessed = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    loss = model.reconstruction(guessed, clean, (4, 4), masked)
    clean[:, :, 4:] += 7
    torch.testing.assert_close(model.reconstruction(guessed, clean, (4, 4), masked), loss)


def test_gradients_reach_the_student_alone_and_the_teacher_sees_clean_views() -> None:
    model, given, shown = method(), batch(locals_=0), list[Tensor]()
    model.teacher.module.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    model.training_step(given, 0).backward()
    assert torch.equal(shown[0], torch.cat(given["views"]))
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_a_momentum_of_zero_copies_the_student_and_of_one_keeps_the_teacher(momentum: float, tmp_path: Path) -> None:
    model = method(momentum=momentum, final_momentum=momentum)
    before = [parameter.clone() for parameter in model.teacher.parameters()]
    fit(model, BATCHES[:2], tmp_path)
    expected = before if momentum else [*model.student.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(expected, model.teacher.parameters(), strict=True))


def test_schedules_are_followed_and_each_step_corrupts_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    temperatures, steps = list[float](), list[int]()
    model = method(momentum=0.5, final_momentum=0.9, freeze_prototypes=0.5, temperature_warmup=0.5)
    corruption = model.corruption

    def softmax(scores: Tensor, centre: Tensor, temperature: float) -> Tensor:
        temperatures.append(temperature)
        return centred_softmax(scores, centre, temperature)

    monkeypatch.setattr(mmc, "centred_softmax", softmax)
    model.corruption = lambda *given: (steps.append(given[3]), corruption(*given))[1]  # type: ignore[assignment]
    momenta, kept = method_runs.taught(model, BATCHES, tmp_path, lambda: model.student.head.prototypes.weight)
    assert momenta == pytest.approx([cosine_between(0.5, 0.9, step / 4) for step in range(4)])
    assert temperatures == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert kept == [True, True, False, False]
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3]  # two views each


def test_a_single_image_trains_without_another_one_to_take_patches_from(tmp_path: Path) -> None:
    assert GroupCorruption().alien > 0
    method_runs.stays_finite(method(corruption=GroupCorruption()), [batch(rows=1, locals_=0)] * 2, tmp_path)


def test_bad_settings_and_parts_are_refused() -> None:
    with pytest.raises(UserError, match=r"contrast=-1 must"):
        method(contrast=-1)
    with pytest.raises(UserError, match=r"contrast_temperature=0.0 must be above 0"):
        method(contrast_temperature=0.0)
    parts = vit(width=16, depth=2, heads=4, img_size=8, patch_size=2, in_chans=1), nn.Linear(16, 8), nn.Linear(8, 8)
    head = DINOHead(16, 9, hidden=(12,), bottleneck=6)
    with pytest.raises(UserError, match=r"decoder.out_features=5, and a patch of 2 x 2 pixels with 1 channels has 4"):
        MMC(*parts, head, nn.Linear(16, 5), optimizer=torch.optim.SGD)
    assert MMC(*parts, head, optimizer=torch.optim.SGD).decoder.out_features == 4
