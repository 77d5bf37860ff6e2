"""SoftCon: MoCo v3 without its soft term and masks, what the student sees, and a network for other bands."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from method_runs import batch
from torch import nn

from lightspan.backbones.bands import other_bands
from lightspan.backbones.vision import MLP, SmallConvNet
from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.contrastive.moco_v3 import MoCoV3
from lightspan.methods.contrastive.softcon import SoftCon
from lightspan.nn.heads.projector import Projector
from lightspan.nn.masking.mask_samplers import RandomMasks
from lightspan.objectives.soft_contrast import soft_contrast

OPTIMIZER = partial(torch.optim.SGD, lr=0.05)


def parts() -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    heads = Projector(8, [16], 6, hidden_norm=False), Projector(6, [16], 6, hidden_norm=False)
    return SmallConvNet(width=4, stages=2), *heads


def method(masks: RandomMasks | None = None, **settings: Any) -> SoftCon:
    built = SoftCon(*parts(), patch=(2, 2), masks=masks, optimizer=OPTIMIZER, **settings)
    built.log_training = lambda figures: None  # type: ignore[method-assign]
    return built


def tagged(rows: int = 6, seed: int = 1) -> dict[str, Any]:
    tags = (torch.rand(rows, 3, generator=torch.Generator().manual_seed(seed)) < 0.6).long()
    return batch(rows, seed, locals_=0) | {"tags": tags}


def test_without_masks_and_soft_term_it_is_moco_v3() -> None:
    ours, given = method(RandomMasks(0.0), soft_weight=0.0, temperature=0.3), tagged()
    reference = MoCoV3(*parts(), temperature=0.3, optimizer=OPTIMIZER)
    reference.log_training = lambda figures: None  # type: ignore[method-assign]
    # MoCo v3 has the sum of the two directions times 2 T, ours is their mean.
    loss, expected = ours.training_step(given, 0), reference.training_step(given, 0) / (4 * 0.3)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad)
    assert all(parameter.grad is None for parameter in ours.teacher.parameters())


def test_the_defaults_are_those_assumed() -> None:
    model = SoftCon(*parts(), optimizer=OPTIMIZER)
    assert (model.hide.masks, model.temperature, model.soft_weight, model.patch) == (
        RandomMasks(0.3),
        0.2,
        1.0,
        (16, 16),
    )


def test_the_loss_is_both_terms_of_a_masked_student_and_a_whole_teacher() -> None:
    model, given = method(soft_weight=0.5, temperature=0.3), tagged()
    first, second = model.masked(given["views"], given["index"])
    assert not torch.equal(first, given["views"][0])
    keys, hold = [model.teacher(view) for view in given["views"]], given["tags"] > 0
    pairs = [(first, keys[1]), (second, keys[0])]
    terms = [soft_contrast(model.predictor(model.student(view)), key, hold, 0.3) for view, key in pairs]
    torch.testing.assert_close(model.training_step(given, 0), sum(i + 0.5 * s for i, s in terms) / 2)


def test_the_share_of_patches_is_hidden_in_all_bands_at_other_places_of_each_view() -> None:
    model, view = method(RandomMasks(0.25)), torch.ones(5, 3, 8, 8)
    masked = torch.stack(model.masked([view, view], torch.arange(5)))
    assert torch.equal(masked.mean(dim=(2, 3, 4)), torch.full((2, 5), 0.75))
    assert torch.equal(masked[:, :, :1].expand_as(masked), masked)
    assert not torch.equal(masked[0], masked[1])
    assert torch.equal(torch.stack(model.masked([view, view], torch.arange(5))), masked)


def test_hidden_patches_hang_on_step_and_scene_and_the_teacher_follows_by_its_momentum() -> None:
    model, view = method(RandomMasks(0.5), momentum=0.75), torch.ones(5, 3, 8, 8)
    (masked,) = model.masked([view], torch.arange(5))
    assert torch.equal(model.masked([view[:2]], torch.tensor([3, 1]))[0], masked[[3, 1]])
    assert len({tuple(row.flatten().tolist()) for row in masked}) == 5
    before = [weight.clone() for weight in model.teacher.parameters()]
    with torch.no_grad():
        for weight in model.student.parameters():
            weight += 1
    model.share_of_run = lambda: 0.0  # type: ignore[method-assign]
    model.after_optimizer_step()
    for was, now in zip(before, model.teacher.parameters(), strict=True):
        torch.testing.assert_close(now, was + 0.25)
    trainer = SimpleNamespace(global_step=1)
    model._trainer = trainer  # type: ignore[assignment]
    assert not torch.equal(model.masked([view], torch.arange(5))[0], masked)


@pytest.mark.parametrize(("rows", "half"), [(1, False), (3, True)])
def test_one_scene_half_precision_and_black_scenes_are_finite(rows: int, half: bool) -> None:
    model, given = method(), tagged(rows)
    given["views"] = [view * 0 for view in given["views"]]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model.training_step(given, 0)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_network_for_other_bands_has_a_new_first_layer_and_is_otherwise_the_same() -> None:
    for make, side, first in (
        (lambda: timm.create_model("resnet18", num_classes=0), 32, "conv1.weight"),
        (lambda: vit(16, 2, 2, img_size=8, patch_size=4), 8, "network.patch_embed.proj.weight"),
        (lambda: SmallConvNet(3, width=4, stages=2), 8, "layers.0.weight"),
    ):
        torch.manual_seed(0)
        network = make()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        after = other_bands(network, 13).state_dict()
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == [first]
        assert after[first].shape[:2] == (before[first].shape[0], 13)
        assert network.eval()(torch.zeros(2, 13, side, side)).isfinite().all()


def test_the_new_first_layer_is_the_old_one_but_for_its_channels() -> None:
    settings: dict[str, Any] = {
        "stride": 2,
        "padding": 1,
        "dilation": 2,
        "padding_mode": "reflect",
        "dtype": torch.bfloat16,
    }
    old = nn.Conv2d(3, 4, 3, **settings)
    new = other_bands(nn.Sequential(old, nn.ReLU()), 5)[0]  # type: ignore[index]
    assert repr(new) == repr(nn.Conv2d(5, 4, 3, **settings))
    assert new.weight.dtype == torch.bfloat16
    assert torch.equal(new.bias, old.bias)
    assert other_bands(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False)), 5)[0].bias is None  # type: ignore[index]


def test_what_it_cannot_train_is_refused() -> None:
    with pytest.raises(UserError, match=r"soft_weight=-1"):
        method(soft_weight=-1.0)
    with pytest.raises(UserError, match=r"cannot be cut into patches of 3 x 3"):
        SoftCon(*parts(), patch=(3, 3), optimizer=OPTIMIZER).training_step(tagged(), 0)
    with pytest.raises(UserError, match="SoftCon needs the tags of each sample"):
        method().training_step(batch(locals_=0), 0)
    with pytest.raises(UserError, match=r"reads tags as whole numbers \[B, G\]"):
        method().training_step(tagged() | {"tags": torch.zeros(6)}, 0)
    with pytest.raises(UserError, match="bands=0 must be at least 1"):
        other_bands(SmallConvNet(), 0)
    with pytest.raises(UserError, match="MLP has none"):
        other_bands(MLP(), 5)
    with pytest.raises(UserError, match="in 2 groups"):
        other_bands(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), 5)
