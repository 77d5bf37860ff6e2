"""The guide: features and saliency are those of its network, which never learns and never leaves evaluation mode."""

import pytest
import torch
from torch import nn

from lightspan.backbones.timm_networks import timm_network
from lightspan.core.errors import UserError
from lightspan.nn.teachers.image_guide import ImageGuide

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def vit(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    return timm_network("vit_tiny_patch16_224", num_classes=0, **SMALL | settings)


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return timm_network("mobilenetv3_small_050", num_classes=0)


def pictures(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 32, 32, generator=torch.Generator().manual_seed(0))


def test_of_a_transformer_saliency_is_the_class_tokens_attention_and_features_are_normed_patches() -> None:
    network = vit()
    guide = ImageGuide(network, 32)
    assert (guide.attends, guide.width) == (True, 24)
    found = guide(pictures())
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (guide.mean, guide.std))
    given = (pictures()[:, None] - mean) / std
    tokens = network.forward_features(given)[:, 1:]  # type: ignore[operator]
    torch.testing.assert_close(found.features_VDhw, tokens.transpose(1, 2).unflatten(2, (4, 4)))
    attention = network.blocks[-1].attn  # type: ignore[union-attr,index]
    inputs = list[torch.Tensor]()
    attention.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    network(given)
    queries, keys, _ = attention.qkv(inputs[0]).unflatten(2, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    weights = (queries[:, :, :1] @ keys.transpose(2, 3) / 12**0.5).softmax(dim=3)[:, :, 0, 1:].mean(dim=1)
    torch.testing.assert_close(found.saliency_Vhw.flatten(1), weights)
    assert (found.saliency_Vhw.sum((1, 2)) < 1).all()


def test_of_a_convolutional_network_saliency_is_the_share_of_a_places_length() -> None:
    network = convnet()
    guide = ImageGuide(network, 64)
    found = guide(torch.rand(2, 64, 64))
    assert not guide.attends
    assert found.features_VDhw.shape == (2, guide.width, 2, 2)
    lengths = found.features_VDhw.norm(dim=1)
    torch.testing.assert_close(found.saliency_Vhw, lengths / lengths.sum((1, 2), keepdim=True))
    assert guide(torch.rand(0, 64, 64)).saliency_Vhw.shape == (0, 2, 2)


def test_a_transformer_without_a_class_token_is_read_like_a_convolutional_network() -> None:
    guide = ImageGuide(vit(class_token=False, global_pool="avg"), 32)
    assert not guide.attends
    torch.testing.assert_close(guide(pictures()).saliency_Vhw.sum((1, 2)), torch.ones(3))


def test_it_stays_as_it_is() -> None:
    guide = ImageGuide(convnet(), 64)
    before = {name: tensor.clone() for name, tensor in guide.state_dict().items()}
    guide.train()
    guide(torch.rand(4, 64, 64))
    assert not any(module.training for module in guide.modules())
    assert not any(parameter.requires_grad for parameter in guide.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in guide.state_dict().items())


def test_networks_and_pictures_that_do_not_fit_are_refused() -> None:
    for make, said in (
        (lambda: ImageGuide(vit(), 40), "side=40"),
        (lambda: ImageGuide(nn.Linear(3, 3), 32), "Linear"),
        (lambda: ImageGuide(convnet(), 64, mean=(0.5,)), "mean"),
        (lambda: ImageGuide(convnet(), 64, std=(0.5, 0.0, 0.5)), "std"),
        (lambda: ImageGuide(convnet(), 0), "side=0"),
    ):
        with pytest.raises(UserError, match=said):
            make()
