"""P2P: what its loss is, what trains and what stays, votes, and clouds without points."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from method_runs import fit
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.vision import SmallConvNet
from lightspan.core.errors import UserError
from lightspan.methods.supervised.p2p import P2P, smoothed
from lightspan.nn.heads.mlp_head import MLPHead
from lightspan.nn.points.edges import EdgeEncoder
from lightspan.nn.points.prompt import PointPrompt
from lightspan.nn.points.views import ViewsFromAbove

COUNTS = 30, 50, 9


def network() -> nn.Module:
    torch.manual_seed(1)
    return SmallConvNet(3, width=8, stages=2)


def method(**settings: Any) -> P2P:
    torch.manual_seed(0)
    prompt = PointPrompt(EdgeEncoder(8, 4, neighbours=4, groups=2), side=16)
    given = {"network": network(), "num_classes": 3, "prompt": prompt, "votes": (3, 2)}
    return P2P(**given | {"optimizer": partial(torch.optim.AdamW, lr=1e-2)} | settings)


def batch(counts: tuple[int, ...] = COUNTS, seed: int = 0) -> dict[str, Tensor]:
    xyz = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed))
    offsets = torch.tensor([0, *np.cumsum(counts).tolist()])
    rows = torch.arange(len(counts))
    return {"xyz": xyz, "offsets": offsets, "index": rows + 7, "label": rows % 3}


def loss_of(model: P2P, given: dict[str, Any]) -> Tensor:
    model.log_training = lambda figures, **options: None  # type: ignore[method-assign]
    return model.training_step(given, 0)


def test_a_share_of_each_label_is_spread_over_all_others() -> None:
    shares = smoothed(torch.tensor([2, 0]), 5, 0.2)
    torch.testing.assert_close(shares, torch.tensor([[0.05, 0.05, 0.8, 0.05, 0.05], [0.8, 0.05, 0.05, 0.05, 0.05]]))
    assert torch.equal(smoothed(torch.tensor([1]), 3, 0.0), torch.tensor([[0.0, 1, 0]]))


def test_the_loss_is_the_smoothed_cross_entropy_of_the_drawn_views() -> None:
    model, given = method().eval(), batch()
    views = model.views.drawn(given["index"], 0)
    log_p = model(given["xyz"], given["offsets"], views).log_softmax(1)
    others = log_p.sum(1) - log_p.diagonal()
    expected = -(0.8 * log_p.diagonal() + 0.1 * others).mean()
    torch.testing.assert_close(loss_of(model, given), expected)


def test_evaluation_averages_the_logits_of_all_views() -> None:
    model, given = method().eval(), batch()
    one_by_one = [
        model(given["xyz"], given["offsets"], axes.expand(3, 3, 3)) for axes in model.views.around(*model.votes)
    ]
    assert len(one_by_one) == 6
    torch.testing.assert_close(model.predict_step(given, 0), torch.stack(one_by_one).mean(0))
    torch.testing.assert_close(model.head(model.features(given)), model.predict_step(given, 0))  # a linear head
    assert model.features(given).shape == (3, model.backbone.module.num_features)


def test_the_prompt_and_the_head_train_and_the_network_stays_bit_for_bit(tmp_path: Path) -> None:
    model = method()
    before = copy.deepcopy(model.state_dict())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(("prompt.", "head."))}
    fit(model, [batch(seed=seed) for seed in range(3)], tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("backbone."), name


def test_norms_and_class_tokens_train_where_they_are_asked_to(tmp_path: Path) -> None:
    model = method(train_norms=True)
    before = copy.deepcopy(model.backbone.state_dict())
    fit(model, [batch()], tmp_path)
    changed = {name for name, tensor in model.backbone.state_dict().items() if not torch.equal(tensor, before[name])}
    norms = [f"module.layers.{at}" for at in (1, 4)]
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{norm}.{name}" for norm in norms for name in names}
    model.eval()
    assert not any(part.training for part in model.modules())
    vit = timm.create_model("vit_tiny_patch16_224", img_size=16, depth=1, num_classes=0)
    tuned = P2P(vit, 3, method().prompt, train_norms=True, optimizer=torch.optim.SGD).backbone
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == {
        "module.cls_token",
        *(f"module.{norm}.{name}" for norm in ("blocks.0.norm1", "blocks.0.norm2", "norm") for name in names[:2]),
    }


def test_it_trains_as_many_numbers_as_the_paper_says() -> None:
    with torch.device("meta"):
        model = P2P(timm.create_model("resnet18", num_classes=0), 40, optimizer=torch.optim.SGD)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    edges = (3 * 8 + 8) + 16 * 64 + 2 * 64 + 64 * 64 + 64
    colours = 2 * (9 * 64 * 64 + 2 * 64) + 64 * 64 + 64 + 64 * 3 + 3
    assert trained == edges + colours + 512 * 40 + 40
    assert round(trained / 1e6, 2) == 0.1


def test_colours_are_of_the_object_and_not_of_the_view() -> None:
    model, given = method().eval(), batch()
    x_NC = model.prompt.encoder(given["xyz"], given["offsets"])
    turned = torch.linalg.qr(torch.randn(3, 3)).Q
    axes = model.views.around(1, 1).expand(3, 3, 3)
    picture = model.prompt.pictures(x_NC, given["xyz"], given["offsets"], axes)
    # Turning the cloud before the projection and the view with it is the same picture: only features tell.
    again = model.prompt.pictures(x_NC, given["xyz"] @ turned, given["offsets"], axes @ turned)
    torch.testing.assert_close(again, picture)


def test_positions_have_a_gradient_through_features_alone() -> None:
    model, given = method().eval(), batch()
    xyz = given["xyz"].requires_grad_()
    x_NC = torch.randn(len(xyz), 8, requires_grad=True)
    model.prompt.pictures(x_NC, xyz, given["offsets"], model.views.around(1, 1).expand(3, 3, 3)).sum().backward()
    assert xyz.grad is None
    assert x_NC.grad is not None


def test_clouds_without_points_with_one_and_with_equal_ones_have_finite_losses() -> None:
    for given in (
        batch((0, 30, 0)),
        batch((0, 0)),
        batch((1,)),
        batch((40,)) | {"xyz": torch.full((40, 3), 2.0)},
    ):
        for dtype in (torch.float32, torch.bfloat16):
            model = method()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = loss_of(model, given)
            loss.backward()
            assert loss.isfinite()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_it_learns_shapes_through_a_network_that_stays(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ball = F.normalize(torch.randn(12, 40, 3, generator=generator), dim=2)
    ball[4:8, :, 2] *= 0.1  # discs
    ball[8:, :, :2] *= 0.1  # rods
    given = {
        "xyz": ball.flatten(0, 1),
        "offsets": torch.arange(13) * 40,
        "label": torch.arange(12) // 4,
        "index": torch.arange(12),
    }
    losses = fit(method(optimizer=partial(torch.optim.AdamW, lr=3e-2)), [given] * 40, tmp_path)
    least = -(0.8 * math.log(0.8) + 0.2 * math.log(0.1))  # of smoothed labels
    assert losses[0] > 0.9 > np.mean(losses[-5:]) > least


def test_settings_that_do_not_fit_are_refused() -> None:
    for settings, said in (
        ({"network": timm.create_model("resnet18")}, "classifier"),
        ({"network": nn.Flatten()}, "num_features"),
        ({"num_classes": 1}, "num_classes=1"),
        ({"votes": (0, 1)}, "votes"),
        ({"smoothing": 1.0}, "smoothing=1"),
        ({"head": nn.Linear(5, 3)}, "head.in_features=5"),
        ({"head": MLPHead(16, 4)}, "num_classes=3"),
        ({"views": ViewsFromAbove, "network": nn.Identity()}, "num_features"),
    ):
        with pytest.raises(UserError, match=said):
            method(**settings)
    assert method(head=MLPHead(16, hidden=[5])).head.out_features == 3
