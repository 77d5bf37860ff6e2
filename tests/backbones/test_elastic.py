"""The elastic transformer: the paper's slices written out, networks cut out of it, and gradients that stay inside."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from lightspan.backbones.elastic import ElasticViT, chosen_blocks
from lightspan.core.errors import UserError
from lightspan.nn.subnets import Size
from lightspan.optim.groups import ParameterGroups

WIDTHS, DEPTHS, HEAD = [8, 16, 24], [1, 2, 4], 4


def vit(**settings: object) -> ElasticViT:
    torch.manual_seed(0)
    network = ElasticViT(WIDTHS, DEPTHS, HEAD, img_size=12, patch_size=4, in_chans=2, init_values=0.1, **settings)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network.eval()


def images(count: int = 3, side: int = 12) -> Tensor:
    return torch.randn(count, 2, side, side, generator=torch.Generator().manual_seed(1))


def test_the_whole_network_is_timms_bit_for_bit() -> None:
    network, x = vit(), images()
    settings = {"embed_dim": 24, "depth": 4, "num_heads": 6, "num_classes": 0, "init_values": 0.1, "in_chans": 2}
    plain = VisionTransformer(img_size=12, patch_size=4, **settings).eval()
    plain.load_state_dict({name: tensor for name, tensor in network.state_dict().items() if name != "mask_token"})
    assert torch.equal(network.tokens(x, network.largest), plain.forward_features(x))
    assert torch.equal(network.tokens(x), plain.forward_features(x))
    assert torch.equal(network(x), plain(x))
    assert network.num_features == 24


def by_hand(network: ElasticViT, image: Tensor, width: int, depth: int) -> Tensor:
    """The paper's section 3.2 line by line; inputs are scaled, not weights."""

    def linear(layer: torch.nn.Linear, x: Tensor, rows: list[int] | range) -> Tensor:
        scaled = x * (layer.in_features / x.shape[-1])
        return scaled @ layer.weight[list(rows), : x.shape[-1]].T + layer.bias[list(rows)]

    def norm(layer: torch.nn.LayerNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), layer.weight[:width], layer.bias[:width], layer.eps)

    patches = F.unfold(image, 4, stride=4).transpose(1, 2)
    projection = network.patch_embed.proj
    x = patches @ projection.weight[:width].flatten(1).T + projection.bias[:width]
    x = torch.cat([network.cls_token[..., :width].expand(len(x), -1, -1), x], dim=1) + network.pos_embed[..., :width]
    for place in torch.linspace(0, 3, depth).floor().int().tolist():
        block = network.blocks[place]
        groups = [linear(block.attn.qkv, norm(block.norm1, x), range(24 * g, 24 * g + width)) for g in range(3)]
        q, k, v = (part.unflatten(2, (-1, HEAD)).transpose(1, 2) for part in groups)
        mixed = (q @ k.transpose(2, 3) / HEAD**0.5).softmax(dim=-1) @ v
        x = x + block.ls1.gamma[:width] * linear(block.attn.proj, mixed.transpose(1, 2).flatten(2), range(width))
        hidden = F.gelu(linear(block.mlp.fc1, norm(block.norm2, x), range(4 * width)))
        x = x + block.ls2.gamma[:width] * linear(block.mlp.fc2, hidden, range(width))
    return norm(network.norm, x)


@pytest.mark.parametrize("size", [Size(8, 1), Size(8, 4), Size(16, 2), Size(20, 3), Size(24, 4)])
def test_a_narrow_and_shallow_pass_is_the_papers(size: Size) -> None:
    network, x = vit().double(), images().double()
    torch.testing.assert_close(network.tokens(x, size), by_hand(network, x, *size), rtol=1e-9, atol=1e-11)


def test_every_network_cut_out_says_what_it_said_inside() -> None:
    network, x = vit(), images()
    for size in network.sizes:
        alone = network.extract(size)
        assert type(alone) is VisionTransformer
        torch.testing.assert_close(alone.forward_features(x), network.tokens(x, size), rtol=1e-5, atol=1e-6)
        assert alone(x).shape == (3, size.width)
        own = {parameter.data_ptr() for parameter in alone.parameters()}
        assert own.isdisjoint(parameter.data_ptr() for parameter in network.parameters())


def test_gradients_of_a_part_vanish_outside_it() -> None:
    network, width = vit(), 8
    network.tokens(images(), Size(width, 2), torch.eye(3).bool().expand(3, 3, 3)).square().sum().backward()
    inside = {
        "cls_token": (..., slice(width)), "pos_embed": (..., slice(width)), "mask_token": (slice(width),),
        "patch_embed.proj.weight": (slice(width),), "patch_embed.proj.bias": (slice(width),),
        "norm.weight": (slice(width),), "norm.bias": (slice(width),),
    }  # fmt: skip
    for place in (0, 3):
        qkv = torch.cat([torch.arange(24 * g, 24 * g + width) for g in range(3)])
        narrow, hidden = slice(width), slice(4 * width)
        for name, rows, columns in (
            ("attn.qkv", qkv, narrow), ("attn.proj", narrow, narrow),
            ("mlp.fc1", hidden, narrow), ("mlp.fc2", narrow, hidden),
        ):  # fmt: skip
            inside[f"blocks.{place}.{name}.weight"] = (rows, columns)
            inside[f"blocks.{place}.{name}.bias"] = (rows,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            inside[f"blocks.{place}.{name}"] = (narrow,)
    for name, parameter in network.named_parameters():
        if name not in inside:
            assert name.startswith(("blocks.1.", "blocks.2."))
            assert parameter.grad is None
            continue
        outside = parameter.grad.clone()
        assert outside[inside[name]].abs().max() > 0, name
        outside[inside[name]] = 0
        assert outside.abs().max() == 0, name


def test_masked_patches_are_replaced_before_positions_are_added() -> None:
    network, x = vit(), images()
    everything = torch.ones(3, 3, 3, dtype=torch.bool)
    assert torch.equal(network.tokens(x, None, everything)[0], network.tokens(x, None, everything)[1])
    assert torch.equal(network.tokens(x, None, ~everything), network.tokens(x))


def test_other_image_sizes_interpolate_positions_and_partial_patches_are_refused() -> None:
    network = vit()
    assert network.tokens(images(side=8), Size(8, 2)).shape == (3, 5, 8)
    with pytest.raises(UserError, match="10 x 10 cannot be cut into patches of 4 x 4"):
        network(images(side=10))


def test_blocks_are_spread_evenly_and_rounded_down() -> None:
    assert chosen_blocks(2, 6) == [0, 5]
    assert chosen_blocks(4, 6) == [0, 1, 3, 5]
    assert chosen_blocks(12, 24) == [int(x) for x in torch.linspace(0, 23, 12, dtype=torch.float64)]
    assert chosen_blocks(24, 24) == list(range(24))
    assert chosen_blocks(1, 6) == [0]


def test_training_drops_branches_in_every_size_and_evaluation_in_none() -> None:
    network, x = vit(drop_path=0.5).train(), images()
    for size in (None, Size(8, 4)):
        assert not torch.equal(network.tokens(x, size), network.tokens(x, size))
    network.eval()
    for size in (None, Size(8, 4)):
        assert torch.equal(network.tokens(x, size), network.tokens(x, size))


def test_it_runs_in_bfloat16_at_every_size() -> None:
    network, x = vit(), images()
    with torch.autocast("cpu", torch.bfloat16):
        for size in network.sizes:
            torch.testing.assert_close(network.tokens(x, size), network.tokens(x, size), rtol=0, atol=0)
    half = vit().bfloat16()
    for size in network.sizes:
        difference = (half.tokens(x.bfloat16(), size).float() - network.tokens(x, size)).abs().mean()
        assert difference < 0.05


def test_timm_rebuilds_a_network_from_its_settings() -> None:
    network = vit()
    alone = network.extract(Size(16, 2))
    again = timm.create_model("vit_tiny_patch16_224", **network.settings(Size(16, 2)))
    again.load_state_dict(alone.state_dict())
    assert torch.equal(again.eval()(images()), alone(images()))


def test_tokens_are_spared_decay_and_the_mask_token_belongs_to_the_stem() -> None:
    groups = ParameterGroups(layer_decay=0.5).optimizer(vit(), lambda found: torch.optim.SGD(found, 1.0)).param_groups
    rates = {name: group["lr"] for group in groups for name in group.get("param_names", [])}
    kinds = {name: group["name"] for group in groups for name in group.get("param_names", [])}
    assert rates["mask_token"] == rates["cls_token"] == rates["patch_embed.proj.weight"]
    assert rates["blocks.3.mlp.fc1.weight"] > rates["mask_token"]
    assert not kinds["mask_token"].startswith("matrices")
    assert "mask_token" in vit().no_weight_decay()  # which others than lightspan read


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": [16, 8]}, r"widths=\[16, 8\] must be whole numbers above 0 in increasing order"),
        ({"depths": []}, r"depths=\[\] must be whole numbers"),
        ({"widths": [8, 18]}, r"widths=\[8, 18\] must be multiples of head_dim=4"),
        ({"img_size": 10}, r"img_size=10 must be a multiple of patch_size=4"),
        ({"patch_size": 0}, r"patch_size=0, and both and in_chans=\d above 0"),
        ({"drop_path": float("nan")}, r"drop_path=nan is a share of branches"),
    ],
)
def test_sizes_that_cannot_be_cut_are_refused(settings: dict, message: str) -> None:
    given = {"widths": WIDTHS, "depths": DEPTHS, "head_dim": HEAD, "img_size": 12, "patch_size": 4} | settings
    with pytest.raises(UserError, match=message):
        ElasticViT(**given)


def test_a_size_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"no network 12x2 in here; widths are 8, 16, 24 and depths 1, 2, 4"):
        vit().extract(Size(12, 2))
