"""Attention before pooling: by hand, with the map of a network, and norms that stay as they came."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightspan.backbones.attended import Attended, FeatureMaps
from lightspan.backbones.vision import MLP, SmallConvNet
from lightspan.core.errors import UserError
from lightspan.nn.heads.spatial_attention import SpatialAttention


def attended(**settings: object) -> Attended:
    torch.manual_seed(0)
    return Attended(SmallConvNet(1, 4, 2), dropout=0.0, **settings)  # type: ignore[arg-type]


def test_features_are_the_mean_of_the_map_times_its_attention() -> None:
    model, image = attended().eval(), torch.randn(3, 1, 8, 8)
    x, attention = model.maps(image)
    assert x.shape == (3, 8, 4, 4)
    assert attention.shape == (3, 1, 4, 4)
    assert ((attention > 0) & (attention < 1)).all()
    torch.testing.assert_close(model(image), (x * attention).flatten(2).mean(dim=2))
    for part in model.gate.parameters():
        nn.init.zeros_(part)
    torch.testing.assert_close(model(image), model.network(image) / 2)  # sigmoid(0)


def test_attention_has_the_papers_widths_and_works_on_few_channels() -> None:
    shapes = [layer.weight.shape[:2] for layer in SpatialAttention(1024).layers[::2]]
    assert shapes == [(128, 1024), (32, 128), (1, 32)]
    assert SpatialAttention(2)(torch.ones(1, 2, 3, 3)).shape == (1, 1, 3, 3)


def test_frozen_norms_keep_their_statistics_in_training_and_train_their_scales() -> None:
    frozen, free = attended(frozen_norms=True).train(), attended().train()
    for model, stays in ((frozen, True), (free, False)):
        norm = model.network.layers[1]
        before = norm.running_mean.clone()
        model(torch.randn(4, 1, 8, 8) + 3).sum().backward()
        assert torch.equal(norm.running_mean, before) == stays
        assert norm.weight.grad is not None


def test_a_stage_of_a_timm_network_is_its_map() -> None:
    maps = FeatureMaps("resnet18", stage=3, in_chans=1)
    assert maps.num_features == 256
    image = torch.randn(2, 1, 64, 64)
    assert maps.forward_features(image).shape == (2, 256, 4, 4)
    assert not any("layer4" in name for name, _ in maps.named_parameters())
    assert maps(image).shape == Attended(maps)(image).shape == (2, 256)


def test_a_network_without_a_map_is_refused() -> None:
    with pytest.raises(UserError, match="MLP lacks one; use FeatureMaps"):
        Attended(MLP((1, 8, 8), (4,)))
    with pytest.raises(UserError, match=r"dropout=1\.0"):
        Attended(SmallConvNet(1, 4, 2), dropout=1.0)
    with pytest.raises(UserError, match="no feature map of stage 9 of 'resnet18'"):
        FeatureMaps("resnet18", stage=9)


def test_a_network_of_tokens_is_refused() -> None:
    tokens = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=0)
    with pytest.raises(UserError, match=r"Attended weighs maps \[B, 8, h, w\], and .* gives \[2, 5, 8\]"):
        Attended(tokens)(torch.zeros(2, 3, 8, 8))
