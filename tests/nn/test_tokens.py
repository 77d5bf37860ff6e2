"""Features by layer and token against timm's and transformers' own, and what networks without layers are told."""

import pytest
import torch
import torchvision
from timm.models.cait import Cait
from timm.models.hrnet import hrnet_w18_small
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.volo import VOLO
from timm.models.xcit import Xcit
from torch import nn
from torch.optim import SGD

from lightspan.backbones.diffusion import DiT
from lightspan.backbones.language import llama
from lightspan.backbones.vision import MLP, LeNet, SmallConvNet
from lightspan.core.errors import UserError
from lightspan.methods.language.causal_lm import CausalLM
from lightspan.methods.supervised.classifier import Classifier
from lightspan.nn.tokens import Tokens, token_features

ViT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0}
TIMM = {
    "ViT": lambda: VisionTransformer(reg_tokens=2, **ViT),
    "ResNet": lambda: ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=0),
    "ResNet, as wide as high": lambda: ResNet(BasicBlock, (1, 1, 1, 1), channels=(4, 8, 8, 8), num_classes=0),
    "Swin": lambda: SwinTransformer(16, 2, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2), num_classes=0),
}


@pytest.mark.parametrize("name", TIMM)
def test_layers_of_a_timm_network_are_those_of_its_forward_intermediates(name: str) -> None:
    torch.manual_seed(0)
    net, images = TIMM[name]().eval(), torch.randn(2, 3, 16, 16)
    prefix = {"return_prefix_tokens": True} if name == "ViT" else {}
    expected = net.forward_intermediates(images, intermediates_only=True, **prefix)
    found = token_features(net, lambda: net(images), [-1, 0])
    for tokens, whole in zip(found, (expected[-1], expected[0]), strict=True):
        map_BDHW = whole[0] if prefix else whole
        assert tokens.grid == tuple(map_BDHW.shape[2:])
        torch.testing.assert_close(tokens.tokens_BTD, map_BDHW.flatten(2).mT)
        torch.testing.assert_close(tokens.pooled(), map_BDHW.mean(dim=(2, 3)))
        if prefix:
            assert tokens.prefix_BPD is not None
            torch.testing.assert_close(tokens.prefix_BPD, whole[1])
            assert tokens.prefix_BPD.shape[1] == 3


IMAGES = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
OWN = {
    "SmallConvNet": (lambda: SmallConvNet(stages=2), (IMAGES,), [(2, 784, 32), (2, 196, 64)]),
    "MLP": (lambda: MLP(hidden=(5, 4)), (IMAGES,), [(2, 1, 5), (2, 1, 4)]),
    "LeNet": (LeNet, (IMAGES,), [(2, 144, 6), (2, 16, 16), (2, 1, 120), (2, 1, 84)]),
    "DiT": (lambda: DiT(28, 7, width=8, depth=2, heads=2), (IMAGES, torch.ones(2)), [(2, 16, 8)] * 2),
}


@pytest.mark.parametrize("name", OWN)
def test_every_network_of_our_own_tells_its_layers(name: str) -> None:
    build, inputs, shapes = OWN[name]
    net = build().eval()
    found = token_features(net, lambda: net(*inputs), range(len(shapes)))
    assert [tuple(tokens.tokens_BTD.shape) for tokens in found] == shapes
    if name != "DiT":  # pooled features are the mean of the last layer's tokens
        torch.testing.assert_close(found[-1].pooled(), net(*inputs))


def test_a_method_reads_tokens_of_the_pass_that_makes_its_features() -> None:
    torch.manual_seed(0)
    method = Classifier(VisionTransformer(**ViT), 5, optimizer=lambda groups: SGD(groups, lr=0.1)).eval()
    batch = {"image": torch.randn(2, 3, 16, 16), "label": torch.zeros(2)}
    first, last = method.token_features(batch, [0, -1])
    assert last.prefix_BPD is not None
    torch.testing.assert_close(method.backbone.norm(last.prefix_BPD[:, 0]), method.features(batch))
    assert first.tokens_BTD.shape == (2, 4, 16)


def test_a_language_model_has_states_by_block() -> None:
    torch.manual_seed(0)
    net = llama(vocab_size=11, width=8, depth=3, heads=2, mlp_width=8, context=8)
    method, tokens_BT = CausalLM(net, optimizer=lambda groups: SGD(groups, lr=0.1)).eval(), torch.randint(11, (2, 7))
    (found,) = method.token_features({"tokens": tokens_BT}, [1])
    expected = net(input_ids=tokens_BT[:, :-1], output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(found.tokens_BTD, expected)


def test_blocks_of_a_network_that_names_no_layers_are_its_layers() -> None:
    net = torchvision.models.VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8).eval()
    images = torch.randn(2, 3, 16, 16)
    first, last = token_features(net, lambda: net(images), [0, -1])
    assert first.tokens_BTD.shape == (2, 5, 8)
    torch.testing.assert_close(net.heads(net.encoder.ln(last.first())), net(images))


@pytest.mark.parametrize(("family", "size"), [(Cait, 32), (Xcit, 32), (Xcit, 48)])
def test_class_tokens_that_come_after_the_blocks_are_not_cut_off(family: type[nn.Module], size: int) -> None:
    torch.manual_seed(0)
    net = family(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0).eval()
    images = torch.randn(2, 3, size, size)
    expected = net.forward_intermediates(images, intermediates_only=True)
    for tokens, map_BDHW in zip(token_features(net, lambda: net(images), [0, 1]), expected, strict=True):
        assert tokens.prefix_BPD is None
        torch.testing.assert_close(tokens.tokens_BTD, map_BDHW.flatten(2).mT)


def volo(size: int) -> VOLO:
    torch.manual_seed(0)
    return VOLO(
        layers=(1, 1, 1, 1), img_size=size, embed_dims=(16, 32, 32, 32), num_heads=(2, 2, 2, 2), num_classes=0,
        stem_hidden_dim=8,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("layer", [0, 1])
def test_a_map_as_wide_as_it_has_features_is_read_as_the_other_layers_are(layer: int) -> None:
    size = (128, 512)[layer]  # 16 features at 16 x 16, or 32 at 32 x 32
    net, images = volo(size), torch.randn(1, 3, size, size)
    (expected,) = net.forward_intermediates(images, indices=[layer], intermediates_only=True)
    assert expected.shape[1] == expected.shape[2]
    (tokens,) = token_features(net, lambda: net(images), [layer])
    torch.testing.assert_close(tokens.tokens_BTD, expected.flatten(2).mT)


def test_the_width_that_is_told_gives_the_order_of_a_maps_axes() -> None:
    net, images = volo(32), torch.randn(2, 3, 32, 32)
    expected = net.forward_intermediates(images, indices=[0], intermediates_only=True)[0]
    (tokens,) = token_features(net, lambda: net(images), [0])
    torch.testing.assert_close(tokens.tokens_BTD, expected.flatten(2).mT)
    net.feature_info[0]["num_chs"] = 5
    with pytest.raises(UserError, match=r"layer 0 \(Sequential\) of VOLO has shape .* feature_info tells 5 features"):
        token_features(net, lambda: net(images), [0])


@pytest.mark.parametrize("inside", [False, True])
def test_a_network_that_was_compiled_and_has_run_is_read_all_the_same(inside: bool) -> None:
    net, images = VisionTransformer(**ViT).eval(), torch.randn(2, 3, 16, 16)
    (expected,) = token_features(net, lambda: net(images))
    compiled = net if inside else torch.compile(net, backend="eager")
    if inside:
        net.compile(backend="eager")
    compiled(images)
    (found,) = token_features(compiled, lambda: compiled(images))
    torch.testing.assert_close(found.tokens_BTD, expected.tokens_BTD)


class Branches(nn.Module):
    """A block of several branches, as CrossViT and SelecSLS have them."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x, x]


def test_layers_that_give_no_tensor_are_named() -> None:
    net = nn.Sequential(nn.Identity(), Branches())
    net.feature_modules = [*net]
    with pytest.raises(UserError, match=r"layer 1 \(Branches\) of Sequential is list, but must be a tensor"):
        token_features(net, lambda: net(IMAGES), [-1])


def test_layers_that_are_no_modules_are_named() -> None:
    with pytest.raises(
        UserError, match=r"not among its modules \(stem, stage1\); .* give it a property feature_modules"
    ):
        token_features(hrnet_w18_small(), lambda: None)


def test_what_cannot_be_read_is_named() -> None:
    net = MLP(hidden=(5, 4))
    with pytest.raises(UserError, match=r"layer 2 is outside the 2 layers of MLP; it must be in \[-2, 1\]"):
        token_features(net, lambda: net(IMAGES), [2])
    with pytest.raises(UserError, match=r"Linear has no list of equal blocks.*give it a property feature_modules"):
        token_features(nn.Linear(2, 2), lambda: None)
    with pytest.raises(UserError, match=r"ResNet has lists of equal blocks side by side .*property feature_modules"):
        token_features(torchvision.models.resnet18(), lambda: None)
    with pytest.raises(UserError, match="MLP ran 0 of the 1 requested layers"):
        token_features(net, lambda: None)


def test_padding_of_a_sequence_has_no_say_in_its_mean() -> None:
    tokens = torch.randn(3, 4, 2).bfloat16()
    valid = torch.arange(4) < torch.tensor([[4], [1], [0]])
    pooled = Tokens(tokens, valid_BT=valid).pooled()
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled[0], tokens[0].float().mean(0))
    torch.testing.assert_close(pooled[1], tokens[1, 0].float())
    assert not pooled[2].any()
    tokens[~valid] = torch.nan
    assert torch.equal(Tokens(tokens, valid_BT=valid).pooled(), pooled)
