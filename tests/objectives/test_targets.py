"""What places of an image are to be guessed as: standardised tokens of a teacher that follows, or pixels."""

import pytest
import torch
from torch import nn

from lightspan.backbones.vision import SmallConvNet
from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.nn.sequences.patches import patchify
from lightspan.objectives.masked import normalised_patches
from lightspan.objectives.moving_targets import MomentumFeatures, Pixels
from lightspan.optim.schedules import cosine_between

IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def backbone(class_token: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return vit(16, 1, 2, img_size=8, patch_size=2, in_chans=1, class_token=class_token)


@pytest.mark.parametrize("class_token", [False, True])
def test_momentum_features_are_the_standardised_tokens_of_patches(class_token: bool) -> None:
    learning, target = backbone(class_token), MomentumFeatures()
    assert target.prepare(learning) == 16
    told = target(IMAGES)
    tokens = learning.tokens(IMAGES)[:, int(class_token) :]  # type: ignore[operator]
    mean, variance = tokens.mean(dim=2, keepdim=True), tokens.var(dim=2, keepdim=True, correction=0)
    torch.testing.assert_close(told, (tokens - mean) / (variance + 1e-5).sqrt())
    assert told.shape == (3, 16, 16)
    assert not told.requires_grad


def test_their_teacher_follows_with_the_momentum_of_the_share_of_the_run() -> None:
    learning, target = backbone(), MomentumFeatures(0.5, 0.9)
    target.prepare(learning)
    before = [p.clone() for p in target.teacher.parameters()]
    with torch.no_grad():
        for parameter in learning.parameters():
            parameter.add_(1.0)
    target.follow(learning, 0.5)
    momentum = cosine_between(0.5, 0.9, 0.5)
    for old, now, new in zip(before, target.teacher.parameters(), learning.parameters(), strict=True):
        torch.testing.assert_close(now, momentum * old + (1 - momentum) * new)


@pytest.mark.parametrize("normalise", [True, False])
def test_pixels_are_those_of_each_patch(normalise: bool) -> None:
    target, patches = Pixels(normalise), patchify(IMAGES, (2, 2))
    assert target.prepare(backbone()) == 4
    assert torch.equal(target(IMAGES), normalised_patches(patches) if normalise else patches)
    assert not target.state_dict()


@pytest.mark.parametrize("target", [MomentumFeatures(), Pixels()])
def test_a_backbone_without_tokens_is_refused(target: MomentumFeatures | Pixels) -> None:
    with pytest.raises(UserError, match=f"{type(target).__name__} needs a backbone with tokens and a grid"):
        target.prepare(SmallConvNet())
