"""The spatial encoder: what it computes, layer by layer, and what of an image its code depends on."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightspan.backbones.spatial_encoder import SpatialEncoder
from lightspan.core.errors import UserError
from lightspan.nn.tokens import token_features


def small(**settings: object) -> SpatialEncoder:
    torch.manual_seed(0)
    return SpatialEncoder(**{"in_chans": 1, "channels": (3, 4), "strides": (2, 1), "maps": 5, "width": 6} | settings)  # type: ignore[arg-type]


def test_the_code_is_the_layers_written_out() -> None:
    network, image = small(), torch.randn(2, 1, 15, 12)
    x = image
    for (convolution, _), stride in zip(network.stages, (2, 1), strict=True):  # type: ignore[misc]
        x = F.gelu(F.conv2d(x, convolution.weight, convolution.bias, stride))
    maps = F.conv2d(x, network.maps.weight, network.maps.bias)
    share = maps.flatten(2).softmax(2).view_as(maps)
    across = (share * torch.linspace(-1, 1, maps.shape[3])).sum((2, 3))
    down = (share * torch.linspace(-1, 1, maps.shape[2])[:, None]).sum((2, 3))
    linear, norm = network.code[0], network.code[1]
    z = torch.stack([across, down], 2).flatten(1) @ linear.weight.T + linear.bias
    z = F.layer_norm(z, (6,), norm.weight, norm.bias).tanh()
    torch.testing.assert_close(network(image), z, atol=1e-6, rtol=1e-5)
    assert network.num_features == 6


def test_a_single_spot_moves_the_places_by_as_much_as_it_moves() -> None:
    network = small(channels=(1,), strides=(1,), maps=1)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        network.stages[0][0].weight[0, 0, 1, 1] = 1.0  # type: ignore[index]
        network.maps.weight.fill_(100.0)
    places: list[torch.Tensor] = []
    network.code.register_forward_hook(lambda module, args, out: places.append(args[0]))
    image = torch.zeros(2, 1, 7, 7)
    image[0, 0, 1, 1] = image[1, 0, 3, 5] = 1.0  # of 5 x 5 pixels that have neighbours on all sides
    network(image)
    torch.testing.assert_close(places[0], torch.tensor([[-1.0, -1], [1, 0]]))


def test_layers_can_be_read_one_by_one() -> None:
    network = small()
    first, last = token_features(network, lambda: network(torch.randn(2, 1, 12, 12)), (0, -1))
    assert [first.tokens_BTD.shape, last.tokens_BTD.shape] == [(2, 25, 3), (2, 9, 4)]


def test_constant_images_and_bfloat16_give_finite_codes_and_gradients() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        network = small().to(dtype)
        code = network(torch.zeros(1, 1, 12, 12, dtype=dtype))
        code.square().sum().backward()
        assert code.dtype == dtype
        assert code.isfinite().all()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())
    assert small()(torch.zeros(0, 1, 12, 12)).shape == (0, 6)


def test_sizes_that_do_not_fit_are_refused() -> None:
    for wrong in ({"strides": (1,)}, {"channels": (), "strides": ()}, {"maps": 0}, {"width": 0}, {"in_chans": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            small(**wrong)
    for image, said in ((torch.zeros(1, 3, 12, 12), "in_chans"), (torch.zeros(1, 1, 7, 12), "strides")):
        with pytest.raises(UserError, match=said):
            small()(image)
