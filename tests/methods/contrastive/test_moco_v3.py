"""MoCo v3: its symmetric loss written out, what stays as it started, and the teacher's schedule."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import torch
from method_runs import batch, fit
from torch import nn
from torch.nn import functional as F

from lightspan.backbones.elastic import ElasticViT
from lightspan.backbones.vision import SmallConvNet
from lightspan.core.errors import UserError
from lightspan.methods.contrastive.moco_v3 import MoCoV3
from lightspan.nn.heads.projector import Projector


def heads(width: int) -> tuple[Projector, Projector]:
    options = {"bias": False, "batch_norm": True}
    return Projector(width, [16, 16], 6, **options), Projector(6, [16], 6, **options)


def method(backbone: nn.Module | None = None, **settings: Any) -> MoCoV3:
    torch.manual_seed(0)
    backbone = backbone or SmallConvNet(width=4, stages=2)
    return MoCoV3(backbone, *heads(8), **settings, optimizer=partial(torch.optim.SGD, lr=0.05))


def silent(model: MoCoV3) -> MoCoV3:
    model.log_training = lambda figures: None  # type: ignore[method-assign]
    return model


def two_views(rows: int = 6, seed: int = 1) -> dict[str, Any]:
    return batch(rows, seed, locals_=0)


def test_the_loss_is_algorithm_1() -> None:
    model, reference, given = silent(method(temperature=0.3)), method(), two_views()
    q1, q2 = (F.normalize(reference.predictor(reference.student(view)), dim=1) for view in given["views"])
    # Its BatchNorms see the batch, as the student's do, and not the statistics of a run.
    teacher = copy.deepcopy(reference.student).train()
    k1, k2 = (F.normalize(teacher(view), dim=1) for view in given["views"])
    label = torch.arange(6)
    expected = 2 * 0.3 * (F.cross_entropy(q1 @ k2.T / 0.3, label) + F.cross_entropy(q2 @ k1.T / 0.3, label))
    loss = model.training_step(given, 0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.teacher.parameters())


def test_the_loss_is_unchanged_when_views_swap() -> None:
    given = two_views()
    swapped = given | {"views": given["views"][::-1]}
    torch.testing.assert_close(silent(method()).training_step(given, 0), silent(method()).training_step(swapped, 0))


def test_a_frozen_patch_projection_keeps_its_random_start_in_student_and_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = ElasticViT(widths=[8], depths=[2], head_dim=4, img_size=8, patch_size=4, in_chans=1, init_values=None)
    model = method(vit, frozen=("patch_embed.*",))
    frozen = {name for name, p in model.student[0].named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    fit(model, [two_views(seed=seed) for seed in range(2)], tmp_path)
    for network in (model.backbone, model.teacher.module[0]):
        held = network.state_dict()
        assert all(torch.equal(held[name], before[name]) for name in frozen)
        assert not torch.equal(held["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])


def test_the_teachers_momentum_rises_on_a_half_cosine(tmp_path: Path) -> None:
    model, batches = method(momentum=0.6), [two_views(seed=seed) for seed in range(4)]
    momenta, _ = method_runs.taught(model, batches, tmp_path, lambda: next(model.parameters()))
    assert momenta == pytest.approx([1 - 0.4 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])


def test_what_it_cannot_train_is_refused() -> None:
    with pytest.raises(UserError, match=r"momentum=-0.1 must lie in \[0, 1\]"):
        method(momentum=-0.1)
    with pytest.raises(UserError, match=r"pattern 'patch.*' matches no parameter of the backbone \(frozen\)"):
        method(frozen=("patch.*",))
    with pytest.raises(UserError, match=r"projector.in_features=8, but SmallConvNet gives 16"):
        method(SmallConvNet(width=8, stages=2))
    with pytest.raises(UserError, match=r"MoCoV3 needs 2 views"):
        method().training_step(batch(), 0)
