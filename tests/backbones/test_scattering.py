"""The wavelets: how many maps, what moves them and by how much; and the network behind them."""

import sys

import pytest
import torch
from torch import Tensor

from lightspan.backbones.scattering import Scattering, ScatteringNet
from lightspan.core.errors import UserError
from lightspan.nn.tokens import token_features

pytest.importorskip("kymatio", reason="the extra `scattering` is not installed")

TINY = {"img_size": (16, 16), "in_chans": 2, "angles": 2, "stem": 4, "stages": ((4, 1), (6, 2)), "grid": 2}


def images(count: int = 3, channels: int = 2, side: int = 16) -> Tensor:
    """Smooth, as pictures are."""
    rough = torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.avg_pool2d(rough, 3, stride=1, padding=1)


@pytest.mark.parametrize(("side", "scales", "angles"), [(16, 1, 3), (16, 2, 4), (32, 3, 2)])
def test_maps_are_as_many_as_the_formula_says_at_a_resolution_of_2_to_the_scales(
    side: int, scales: int, angles: int
) -> None:
    count = 1 + angles * scales + angles**2 * scales * (scales - 1) // 2
    transform = Scattering((side, side), scales, angles)
    assert transform.maps == count
    assert transform(images(side=side)).shape == (3, 2, count, side >> scales, side >> scales)
    assert Scattering((32, 32)).maps == 289  # the paper's, of a channel


def test_nothing_is_trained_and_the_same_image_gives_the_same_bits() -> None:
    transform, x = Scattering((16, 16), 2, 4), images()
    assert not list(transform.parameters())
    assert torch.equal(transform(x), transform(x))
    assert torch.equal(transform.train()(x), transform.eval()(x))


def test_it_brings_no_two_images_farther_apart() -> None:
    transform, x = Scattering((16, 16), 2, 4), images(12)
    seen = transform(x)
    for i in range(1, 12):
        assert (seen[0] - seen[i]).norm() <= (x[0] - x[i]).norm() * (1 + 1e-3)


def test_a_shift_by_a_pixel_changes_it_three_times_less_than_the_pixels() -> None:
    transform = Scattering((32, 32), 2, 4)
    x = torch.zeros(1, 1, 32, 32)
    x[..., 8:24, 10:22] = torch.rand(16, 12, generator=torch.Generator().manual_seed(0))
    moved = x.roll(1, dims=3)
    pixels, maps = (moved - x).norm() / x.norm(), (transform(moved) - transform(x)).norm() / transform(x).norm()
    assert maps * 3 <= pixels


def test_half_precision_is_widened_also_under_autocast() -> None:
    transform, x = Scattering((16, 16), 2, 2), images()
    assert torch.equal(transform(x.bfloat16()), transform(x.bfloat16().float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transform(x), transform(x))
        assert transform(x).dtype == torch.float32


@pytest.mark.parametrize("normalise", [False, True])
def test_the_network_gives_the_last_width_in_each_cell_and_every_weight_a_gradient(normalise: bool) -> None:
    torch.manual_seed(0)
    network = ScatteringNet(**TINY, normalise=normalise)
    out = network(images())
    assert out.shape == (3, network.num_features) == (3, 24)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    tokens = token_features(network, lambda: network(images()), (0, -1))
    assert [layer.tokens_BTD.shape for layer in tokens] == [(3, 16, 4), (3, 16, 6)]
    assert network(torch.zeros(2, 2, 16, 16)).isfinite().all()


def test_the_papers_networks_have_their_blocks() -> None:
    small = ScatteringNet((16, 16), angles=1, stem=32, stages=((64, 4), (128, 4)))
    assert len(small.blocks) == 8
    assert small.num_features == 2048
    assert sum(block.downsample is not None for block in small.blocks) == 2


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"both sides of img_size=\[3, 16\] at least 2\^scales = 4"):
        Scattering((3, 16))
    with pytest.raises(UserError, match=r"angles=0 must be at least 1"):
        Scattering((16, 16), angles=0)
    with pytest.raises(UserError, match=r"images of \[8, 8\] pixels, .* img_size=\[16, 16\]"):
        Scattering((16, 16), angles=2)(images(side=8))
    with pytest.raises(UserError, match=r"stages=\[\] must be at least 1, and there must be a stage"):
        ScatteringNet(**TINY | {"stages": ()})
    monkeypatch.setitem(sys.modules, "kymatio.scattering2d.frontend.torch_frontend", None)
    with pytest.raises(UserError, match=r"kymatio.*\[scattering\]"):
        Scattering((16, 16))
