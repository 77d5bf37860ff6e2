"""The contract of tokens, for timm's transformers of all kinds and for the elastic one."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lightspan.backbones.elastic import ElasticViT
from lightspan.backbones.vision import SmallConvNet
from lightspan.backbones.vit import TokenViT, vit
from lightspan.core.errors import UserError
from lightspan.nn.sequences.patches import at_places
from lightspan.nn.sequences.token_backbone import TokenBackbone, require_tokens
from lightspan.nn.tokens import token_features

SMALL = {"img_size": 12, "patch_size": 3, "in_chans": 1, "num_classes": 0, "embed_dim": 16, "depth": 2, "num_heads": 2}
timm_vit, eva = partial(VisionTransformer, **SMALL), partial(Eva, **SMALL, use_rot_pos_emb=True, global_pool="token")
own = partial(vit, 16, 2, 2, img_size=12, patch_size=3, in_chans=1, mask_token=True)
KINDS: dict[str, Callable[[], Any]] = {
    "plain": lambda: TokenViT(timm_vit(), mask_token=True),
    "registers": lambda: TokenViT(timm_vit(reg_tokens=2, no_embed_class=True), mask_token=True),
    "no class token": lambda: TokenViT(timm_vit(class_token=False, global_pool="avg"), mask_token=True),
    "any size": lambda: TokenViT(timm_vit(dynamic_img_size=True, pre_norm=True), mask_token=True),
    "fixed positions": own,
    "fixed, of patches alone": lambda: own(class_token=False),
    "rotary": lambda: TokenViT(eva(use_abs_pos_emb=False), mask_token=True),
    "rotary and learned, any size": lambda: TokenViT(eva(dynamic_img_size=True, num_reg_tokens=1), mask_token=True),
    "rotary, mixed": lambda: TokenViT(eva(rope_type="mixed", use_abs_pos_emb=False), mask_token=True),
    "DINOv3": lambda: TokenViT(eva(rope_type="dinov3", use_abs_pos_emb=False, dynamic_img_size=True), mask_token=True),
    "elastic": lambda: ElasticViT([8, 16], [1, 2], head_dim=8, img_size=12, patch_size=3, in_chans=1),
}  # fmt: skip


def made(kind: str) -> Any:
    torch.manual_seed(0)
    backbone = KINDS[kind]().eval()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if (parameter.requires_grad and parameter.ndim > 1) or "mask_token" in name:
                parameter.normal_(std=0.5)  # so that all that a network reads has a say
    return backbone


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_networks_own_and_the_prefix_comes_first(kind: str) -> None:
    backbone, x = made(kind), images()
    assert require_tokens(backbone, "test") is backbone
    tokens = backbone.tokens(x)
    assert backbone.grid(x) == (4, 4)
    assert backbone.patch_shape == (3, 3, 1)
    assert tokens.shape == (3, backbone.num_prefix_tokens + 16, backbone.num_features)
    assert backbone(x).shape == (3, backbone.num_features)
    network = getattr(backbone, "network", backbone)
    close(tokens, network.fc_norm(network.forward_features(x)))
    if backbone.num_prefix_tokens:
        close(tokens[:, 0], backbone(x))
    [layer] = token_features(backbone, lambda: backbone(x))
    assert layer.tokens_BTD.shape[1] == 16
    assert layer.grid == (4, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_patches_are_encoded_as_if_there_were_no_others(kind: str) -> None:
    backbone, x = made(kind), images()
    keep = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:5] for i in range(3)])
    prefix = backbone.num_prefix_tokens
    tokens = backbone.tokens(x, keep_BK=keep)
    assert tokens.shape == (3, prefix + 5, backbone.num_features)
    order = torch.tensor([3, 0, 4, 1, 2])
    close(backbone.tokens(x, keep_BK=keep[:, order])[:, prefix:], tokens[:, prefix:][:, order])
    everything = torch.arange(16).flip(0).expand(3, -1)
    close(at_places(backbone.tokens(x, keep_BK=everything)[:, prefix:], everything), backbone.tokens(x)[:, prefix:])
    # Pixels of patches that are not kept say nothing; those of kept ones do, and so do the places.
    hidden = torch.ones(3, 16, dtype=torch.bool).scatter(1, keep, False).view(3, 1, 4, 1, 4, 1)
    blind = torch.where(hidden, 9.0, x.view(3, 1, 4, 3, 4, 3)).view_as(x)
    close(backbone.tokens(blind, keep_BK=keep), tokens)
    assert not torch.allclose(backbone.tokens(x + ~hidden.expand(3, 1, 4, 3, 4, 3).reshape_as(x), keep_BK=keep), tokens)
    moved = x.roll(3, dims=3)  # by one patch, whose place alone changes
    at = (keep // 4) * 4 + (keep % 4 + 1) % 4
    assert not torch.allclose(backbone.tokens(moved, keep_BK=at), tokens, atol=1e-3)
    close(backbone.tokens(x), backbone.tokens(x, keep_BK=None))  # nothing is left of the places
    one = backbone.tokens(x, keep_BK=keep[:, :1])
    assert one.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_token_hides_what_patches_show_but_not_where_they_are(kind: str) -> None:
    backbone, x = made(kind), images()
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    close(backbone.tokens(x, mask_BHW=mask), backbone.tokens(x))
    mask[0, 1, 2] = mask[2] = True
    mask[2, 0, 0] = False
    hidden = mask[:, None].repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    tokens = backbone.tokens(x, mask_BHW=mask)
    close(backbone.tokens(torch.where(hidden, 5.0, x), mask_BHW=mask), tokens)
    close(tokens[1], backbone.tokens(x)[1])
    assert not torch.allclose(tokens[0], backbone.tokens(x)[0], atol=1e-3)
    of_hidden = tokens[2, backbone.num_prefix_tokens + 1 :]
    assert (of_hidden[1:] - of_hidden[:1]).abs().amax() > 1e-3
    # Both at once: what is kept of what is hidden.
    keep = torch.tensor([[6, 0], [6, 0], [6, 0]])
    both = backbone.tokens(torch.where(hidden, 5.0, x), mask_BHW=mask, keep_BK=keep)
    close(both, backbone.tokens(x, mask_BHW=mask, keep_BK=keep))
    backbone.tokens(x, mask_BHW=mask).square().sum().backward()
    assert backbone.mask_token.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["any size", "rotary and learned, any size", "DINOv3", "elastic"])
def test_images_of_other_sizes_have_their_own_grid(kind: str) -> None:
    backbone, x = made(kind), torch.randn(2, 1, 6, 15)
    assert backbone.grid(x) == (2, 5)
    tokens = backbone.tokens(x)
    prefix = backbone.num_prefix_tokens
    assert tokens.shape == (2, prefix + 10, 16)
    keep = torch.arange(10).flip(0).expand(2, -1)
    close(backbone.tokens(x, keep_BK=keep)[:, prefix:], tokens[:, prefix:].flip(1))
    mask = torch.zeros(2, 2, 5, dtype=torch.bool)
    mask[0] = True
    assert backbone.tokens(x, mask_BHW=mask).shape == tokens.shape
    with pytest.raises(UserError, match="cannot be cut into patches of 3 x 3"):
        backbone.tokens(torch.randn(2, 1, 7, 15))


def test_a_network_of_one_size_names_it() -> None:
    for call in (own(), own().tokens):
        with pytest.raises(
            UserError, match=r"images of 6 x 6 pixels do not fit a network for 12 x 12; .*image_size, .*any_size=true"
        ):
            call(torch.zeros(1, 1, 6, 6))


def test_fixed_positions_do_not_train_and_are_no_weights_of_a_copy() -> None:
    backbone = own()
    positions = backbone.network.pos_embed
    assert not positions.requires_grad
    assert positions[0, 0].eq(0).all()
    twin = copy.deepcopy(backbone)
    x, keep = images(), torch.zeros(3, 2, dtype=torch.int64)
    twin.network.patch_drop.places_BK = keep  # its own
    assert backbone.network.patch_drop.places_BK is None
    assert backbone.tokens(x).shape[1] == 17
    assert not any("patch_drop" in name for name in backbone.state_dict())


def test_half_precision_and_empty_batches_pass() -> None:
    backbone, x = made("fixed positions"), images()
    keep, mask = torch.tensor([[1, 2]] * 3), torch.ones(3, 4, 4, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        assert backbone.tokens(x, mask, keep).isfinite().all()
    assert backbone.bfloat16().tokens(x.bfloat16(), mask, keep).dtype == torch.bfloat16
    assert made("plain").tokens(x[:0], keep_BK=keep[:0]).shape == (0, 3, 16)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="network is SmallConvNet"):
        TokenViT(SmallConvNet())
    with pytest.raises(UserError, match="network is ElasticViT"):
        TokenViT(made("elastic"))
    with pytest.raises(UserError, match="patch_drop_rate=0"):
        TokenViT(timm_vit(patch_drop_rate=0.5))
    with pytest.raises(UserError, match="this network has none"):
        TokenViT(eva(use_abs_pos_emb=False), sincos=True)
    with pytest.raises(UserError, match="set mask_token=true"):
        own(mask_token=False).tokens(images(), mask_BHW=torch.zeros(3, 4, 4, dtype=torch.bool))
    with pytest.raises(UserError, match="a backbone with tokens and a grid, and SmallConvNet has none"):
        require_tokens(SmallConvNet(), "MAE")
    with pytest.raises(UserError, match="width=10 must be a multiple of heads=4"):
        vit(width=10, heads=4)
    for wrong in (1.0, (0.1, 1.0), (-0.1, 0.1)):
        with pytest.raises(UserError, match="vit drop_path"):
            vit(drop_path=wrong)


@pytest.mark.parametrize(("drop_path", "expected"), [(0.2, [0, 0.1, 0.2]), ((0.2, 0.2), [0.2] * 3), (0.0, [0, 0, 0])])
def test_branches_are_dropped_ever_more_often_or_equally_often_in_all_blocks(drop_path: Any, expected: list) -> None:
    model = vit(width=8, depth=3, heads=2, img_size=8, patch_size=4, drop_path=drop_path)
    shares = [
        getattr(drop, "drop_prob", 0.0)
        for block in model.network.blocks
        for drop in (block.drop_path1, block.drop_path2)
    ]
    assert shares == pytest.approx([share for share in expected for _ in range(2)])


def test_the_contract_is_told_by_what_a_module_has() -> None:
    class Own(nn.Module):
        num_features, num_prefix_tokens, patch_shape = 4, 0, (1, 1, 1)

        def grid(self, image_BChw: Tensor) -> tuple[int, int]:
            return 1, 1

        def tokens(self, image_BChw: Tensor, mask_BHW: Any = None, keep_BK: Any = None) -> Tensor:
            return image_BChw

    assert isinstance(Own(), TokenBackbone)
    assert not isinstance(nn.Identity(), TokenBackbone)


def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(UserError, match="images of 3 channels do not fit a network for 1; make it with in_chans=3"):
        own().tokens(torch.zeros(2, 3, 12, 12))


def test_swiglu_has_dinov2s_widths_and_gates_by_the_first_half() -> None:
    with torch.device("meta"):
        for width, hidden in ((64, 176), (384, 1024), (1024, 2736), (1536, 4096)):
            mlp = vit(width, 1, 4, img_size=8, patch_size=4, swiglu=True).feature_modules[0].mlp
            assert (mlp.fc1.out_features, mlp.fc2.in_features) == (2 * hidden, hidden)
    mlp = own(swiglu=True).feature_modules[0].mlp
    x = torch.randn(3, 16)
    first, second = mlp.fc1(x).chunk(2, dim=1)
    torch.testing.assert_close(mlp(x), mlp.fc2(torch.nn.functional.silu(first) * second))


@pytest.mark.parametrize("kind", KINDS)
def test_no_image_gives_no_token_and_every_weight_a_gradient_of_zero(kind: str) -> None:
    backbone, none = made(kind), images(0)
    tokens = backbone.tokens(none, mask_BHW=torch.zeros(0, 4, 4, dtype=torch.bool))
    assert tokens.shape == (0, 16 + backbone.num_prefix_tokens, backbone.num_features)
    assert backbone(none).shape == (0, backbone.num_features)
    tokens.sum().backward()
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad and "fc_norm" not in name:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


@pytest.mark.parametrize("kind", ["plain", "any size", "DINOv3"])
def test_an_exported_network_takes_any_number_of_images(kind: str) -> None:
    backbone = made(kind)
    with torch.no_grad():
        program = torch.export.export(backbone, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
        close(program.module()(images(5)), backbone(images(5)))
