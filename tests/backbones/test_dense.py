"""Backbones that give maps of the image's size."""

import pytest
import torch

from lightspan.backbones.dense import PyramidMaps, UNet
from lightspan.errors import UserError


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


def test_a_pyramid_of_a_timm_network_too() -> None:
    network = PyramidMaps("resnet10t", width=8).eval()
    assert network(torch.randn(1, 3, 64, 96)).shape == (1, 8, 64, 96)
    assert network.num_features == 8


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"UNet of 3 levels needs sides that are multiples of 4, .* \[6, 8\]"):
        UNet(1, 4, 3)(torch.zeros(1, 1, 6, 8))
    with pytest.raises(UserError, match="width=6 a multiple of 4"):
        UNet(1, 6)
    with pytest.raises(UserError, match="timm gives no maps of levels"):
        PyramidMaps("no_such_network")
