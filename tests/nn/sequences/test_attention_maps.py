"""Attention that is read while a network runs: it is the network's own, layer by layer, with all that it depends on."""

import pytest
import timm
import torch
from torch import nn

from lightspan.backbones.vision import SmallConvNet
from lightspan.backbones.vit import TokenViT, vit
from lightspan.core.errors import UserError
from lightspan.nn.sequences.attention_maps import attention_logits, attention_of, parameters_behind
from lightspan.nn.taps import tapped


def network(**settings: int) -> TokenViT:
    torch.manual_seed(0)
    return vit(16, 3, 4, img_size=8, patch_size=4, in_chans=1, **settings)  # type: ignore[arg-type]


IMAGE = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("last_heads", [4, 2, 16])
def test_the_softmax_of_the_logits_weighs_the_values_as_the_layer_does(last_heads: int) -> None:
    backbone = network(last_heads=last_heads)
    attention = attention_of(backbone, -1)
    with tapped([attention.qkv]) as projected, tapped([attention]) as given:
        (logits_BHNN,) = attention_logits(backbone, lambda: backbone(IMAGE))
    assert logits_BHNN.shape == (5, last_heads, 5, 5)
    value_BHNc = projected[0].chunk(3, dim=2)[2].unflatten(2, (last_heads, -1)).transpose(1, 2)
    mixed_BND = (logits_BHNN.softmax(dim=3) @ value_BHNc).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.proj(mixed_BND), given[0])


def test_layers_come_in_the_order_asked_for_and_what_is_kept_is_what_keep_makes() -> None:
    backbone = network()
    whole = attention_logits(backbone, lambda: backbone(IMAGE), (0, 1, 2))
    again = attention_logits(backbone, lambda: backbone(IMAGE), (-1, 0, -1), keep=lambda logits: logits.sum(dim=0))
    for found, layer in zip(again, (2, 0, 2), strict=True):
        assert torch.equal(found, whole[layer].sum(dim=0))
    assert not any(module._forward_hooks for module in backbone.modules())


@pytest.mark.parametrize("layer", [-1, 1])
def test_what_lies_behind_a_map_is_what_gets_no_gradient_from_it(layer: int) -> None:
    backbone = network()
    (logits,) = attention_logits(backbone, lambda: backbone(IMAGE), [layer])
    logits.square().sum().backward()
    behind = {id(parameter) for parameter in parameters_behind(backbone, layer)}
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trained if parameter.grad is None} == behind
    gradient = attention_of(backbone, layer).qkv.weight.grad
    assert gradient is not None
    assert not gradient[-16:].any()  # the values'
    assert gradient[:-16].any()


def test_heads_of_the_last_block_divide_the_same_weights() -> None:
    plain, divided = network(), network(last_heads=8)
    assert all(map(torch.equal, plain.state_dict().values(), divided.state_dict().values()))
    pair = [attention_logits(one, lambda one=one: one(IMAGE), (0, -1)) for one in (plain, divided)]
    assert torch.equal(pair[0][0], pair[1][0])
    assert (pair[0][1].shape[1], pair[1][1].shape[1]) == (4, 8)


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(UserError, match=r"layer 0 .* whose maps cannot be read; take lightspan.backbones.vit.vit"):
        attention_of(SmallConvNet(in_chans=1, width=4, stages=2), 0)
    with pytest.raises(UserError, match="layer 3 is outside the 3 layers"):
        attention_of(network(), 3)
    with pytest.raises(UserError, match="width=16 must be a multiple of last_heads=5"):
        network(last_heads=5)
    with pytest.raises(UserError, match="multiple of last_heads=0, which must be above 0"):
        network(last_heads=0)


def test_rotary_positions_are_refused() -> None:
    eva = timm.models.eva.Eva(
        img_size=8, patch_size=4, in_chans=1, num_classes=0, embed_dim=16, depth=1, num_heads=2, use_rot_pos_emb=True
    )
    backbone: nn.Module = TokenViT(eva)
    with pytest.raises(UserError, match="layer 0 of TokenViT has EvaAttention, whose maps cannot be read"):
        attention_logits(backbone, lambda: backbone(IMAGE), [0])
