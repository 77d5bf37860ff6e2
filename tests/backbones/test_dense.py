"""Backbones that give maps of the image's size."""

from typing import Any

import pytest
import torch
from torch import nn

from lightspan.backbones.dense import EncodedMaps, PooledMaps, PyramidMaps, UNet, UNetEncoder
from lightspan.backbones.grid_swin import GridSwin
from lightspan.backbones.mix_transformer import MixTransformer
from lightspan.core.errors import UserError
from lightspan.nn.tokens import token_features


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_unet_gives_maps_of_the_images_size_from_all_its_weights(levels: int) -> None:
    network = UNet(2, width=8, levels=levels)
    maps = network(torch.randn(3, 2, 8, 12))
    assert maps.shape == (3, network.num_features, 8, 12)
    maps.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_images_do_not_see_one_another() -> None:
    network, image = UNet(1, width=4, levels=2), torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(network(image)[:1], network(image[:1]))


def test_a_unet_of_volumes_holds_its_encoder() -> None:
    network, encoder = UNet(2, 4, 3, axes=3), UNetEncoder(2, 4, 3, axes=3)
    volume = torch.randn(2, 2, 4, 8, 12)
    assert network(volume).shape == (2, 4, 4, 8, 12)
    weights = encoder.state_dict()
    encoder.load_state_dict({name: value for name, value in network.state_dict().items() if name in weights})
    maps = encoder.maps(volume)
    assert [tuple(one.shape[1:]) for one in maps] == [(4, 4, 8, 12), (8, 2, 4, 6), (16, 1, 2, 3)]
    assert encoder.widths == [4, 8, 16]
    assert encoder.num_features == 16
    torch.testing.assert_close(encoder(volume), network.maps(volume)[-1].mean(dim=(2, 3, 4)))
    for axes in (1, 2):
        assert UNet(1, 4, 2, axes=axes)(torch.zeros(1, 1, *[4] * axes)).shape == (1, 4, *[4] * axes)
    with pytest.raises(UserError, match="axes=4"):
        UNetEncoder(1, 4, 2, axes=4)


def test_the_means_of_all_levels_are_features() -> None:
    swin = GridSwin((2, 2, 2), (2, 2, 2), width=4, depths=(1, 1), heads=(1, 2))
    volume = torch.randn(2, 1, 4, 8, 12)
    for encoder, widths in ((UNetEncoder(1, 4, 3, axes=3), (4, 8, 16)), (swin, (4, 8))):
        network = PooledMaps(encoder)
        parts = network(volume).split(widths, dim=1)
        assert network.num_features == sum(widths)
        for part, level in zip(parts, encoder.maps(volume), strict=True):
            torch.testing.assert_close(part, level.mean(dim=(2, 3, 4)))
        assert [layer.tokens_BTD.shape[2] for layer in token_features(network, lambda n=network: n(volume), (0, -1))]
    with pytest.raises(UserError, match="Linear does not tell the maps"):
        PooledMaps(nn.Linear(2, 2))


def test_a_pyramid_of_a_timm_network_too() -> None:
    network = PyramidMaps("resnet10t", width=8).eval()
    assert network(torch.randn(1, 3, 64, 96)).shape == (1, 8, 64, 96)
    assert network.num_features == 8


def mix_transformer(**settings: Any) -> MixTransformer:
    return MixTransformer(**{"depths": (1, 1, 2, 1), "widths": (4, 8, 12, 16), "heads": (1, 2, 3, 4)} | settings)


def test_a_mix_transformer_gives_four_maps_which_are_joined_at_the_images_size() -> None:
    network = EncodedMaps(mix_transformer(in_chans=2), width=8, dropout=0.0).train()
    levels = network.encoder(torch.randn(2, 2, 64, 96))
    assert [tuple(level.shape) for level in levels] == [
        (2, 4, 16, 24), (2, 8, 8, 12), (2, 12, 4, 6), (2, 16, 2, 3),
    ]  # fmt: skip
    maps = network(torch.randn(2, 2, 64, 96))
    assert maps.shape == (2, network.num_features, 64, 96)
    maps.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_joined_maps_are_dropped_whole() -> None:
    network = EncodedMaps(mix_transformer(), width=64, dropout=0.25).train()
    gone_BF = (network(torch.randn(8, 3, 64, 64)) == 0).flatten(2).all(dim=2)
    assert float(gone_BF.float().mean()) == pytest.approx(0.25, abs=0.08)
    assert EncodedMaps(mix_transformer(), width=8).join[-1].p == 0.1


def test_the_defaults_are_mit_b5() -> None:
    with torch.device("meta"):
        network = MixTransformer()
    assert sum(p.numel() for p in network.parameters()) == 81_443_008  # the paper's 81.4 million


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"MixTransformer depths=\[1, 2\], .* must have four numbers"):
        mix_transformer(depths=(1, 2))
    with pytest.raises(UserError, match=r"heads=\[3, 2, 3, 4\] .* a multiple of its heads"):
        mix_transformer(heads=(3, 2, 3, 4))
    with pytest.raises(UserError, match=r"maps of width=8 of Identity: .* the widths of its maps as `widths`"):
        EncodedMaps(nn.Identity(), width=8)
    with pytest.raises(UserError, match="maps of width=0 of MixTransformer"):
        EncodedMaps(mix_transformer(), width=0)
    with pytest.raises(UserError, match=r"EncodedMaps dropout=1\.0"):
        EncodedMaps(mix_transformer(), dropout=1.0)
    with pytest.raises(UserError, match=r"UNet of 3 levels needs sides that are multiples of 4, .* \[6, 8\]"):
        UNet(1, 4, 3)(torch.zeros(1, 1, 6, 8))
    with pytest.raises(UserError, match=r"2 of them, .* \[4, 8, 8\]"):
        UNet(1, 4, 3)(torch.zeros(1, 1, 4, 8, 8))
    with pytest.raises(UserError, match="width=6 a multiple of 4"):
        UNet(1, 6)
    with pytest.raises(UserError, match="timm has no network named 'no_such_network'"):
        PyramidMaps("no_such_network")
    with pytest.raises(UserError, match="timm gives no maps of levels"):
        PyramidMaps("resnet10t", levels=(0, 99))
