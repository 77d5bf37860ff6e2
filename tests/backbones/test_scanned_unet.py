"""U-Nets of scans: maps of samples of two and three axes, the published sizes, and what does not fit."""

import pytest
import torch
from torch import nn

from lightspan.backbones.scanned_unet import PatchExpanding, ScannedUNet
from lightspan.core.errors import UserError
from lightspan.nn.tokens import token_features

SMALL = {"in_chans": 1, "width": 8, "depths": (1, 2), "depths_up": (1, 1), "states": 2}


def small(**settings: object) -> ScannedUNet:
    torch.manual_seed(0)
    return ScannedUNet(**{"patch": (2, 2), **SMALL, **settings})


def test_pictures_and_volumes_become_maps_of_their_sides() -> None:
    for patch, sides in (((2, 2), (8, 12)), ((4, 2), (8, 4)), ((1, 2, 2), (4, 8, 4)), ((2, 4, 4), (4, 8, 8))):
        for patterns in (["snake", "diagonal", "spiral", "raster"], None):
            network = small(patch=patch, patterns=patterns)
            x = torch.randn(2, 1, *sides, requires_grad=True)
            maps = network(x)
            assert maps.shape == (2, network.num_features, *sides)
            maps.sum().backward()
            assert x.grad.isfinite().all()
            assert all(weight.grad is not None for weight in network.parameters())
            grid = [side // p for side, p in zip(sides, patch, strict=True)]
            assert [[*one.shape[1:]] for one in network.maps(x)] == [[8, *grid], [16, *(side // 2 for side in grid)]]


def test_a_token_becomes_a_block_of_its_own() -> None:
    expand = PatchExpanding(3, 5, (2, 3))
    x = torch.randn(1, 2, 2, 3)
    found = expand(x)
    assert found.shape == (1, 4, 6, 5)
    other = x.clone()
    other[0, 1, 0] += 1
    changed = (expand(other) != found).any(dim=-1)[0]
    assert changed.nonzero().tolist() == [[row, column] for row in (2, 3) for column in range(3)]


def test_rows_do_not_see_one_another_and_constant_pictures_are_finite() -> None:
    network = small()
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]))
    for flat in (torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 1e4)):
        assert network(flat).isfinite().all()
    assert network.bfloat16()(torch.randn(1, 1, 8, 8).bfloat16()).isfinite().all()
    assert small()(torch.zeros(0, 1, 8, 8)).shape == (0, 4, 8, 8)


def test_the_published_network() -> None:
    with torch.device("meta"):
        network, ss2d = ScannedUNet(), ScannedUNet(patterns=None)
    assert network.widths == [96, 192, 384, 768]
    assert network.num_features == 24
    assert [len(stage) for stage in (*network.down, *network.up)] == [2, 2, 2, 2, 2, 2, 2, 1]
    assert [expand.expand.out_features for expand in (*network.expand, network.last)] == [1536, 768, 384, 384]
    shares = [getattr(block.drop_path, "drop_prob", 0.0) for stage in network.down for block in stage]
    assert shares == pytest.approx([0.2 * number / 7 for number in range(8)])
    shares = [getattr(block.drop_path, "drop_prob", 0.0) for stage in network.up for block in stage]
    assert shares == pytest.approx([0.2 * number / 6 for number in range(6, -1, -1)])
    weights = [sum(weight.numel() for weight in each.parameters()) for each in (network, ss2d)]
    assert weights[0] < weights[1]


def test_layers_are_read_as_maps() -> None:
    network, x = small(), torch.randn(2, 1, 8, 12)
    first, last = token_features(network, lambda: network(x), (0, -1))
    assert (first.grid, last.grid) == ((4, 6), (2, 3))
    assert last.tokens_BTD.shape == (2, 6, 16)
    torch.testing.assert_close(last.tokens_BTD, network.maps(x)[-1].flatten(2).mT)


def test_settings_and_samples_that_do_not_fit_are_named() -> None:
    for settings, said in (
        ({"patch": (2,)}, "patch="),
        ({"patch": (2, 3)}, "width=8"),
        ({"depths_up": (1,)}, "depths_up="),
        ({"depths": ()}, "depths="),
        ({"depths": (1, 0)}, "depths="),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"patterns": ["zigzag"]}, "zigzag"),
    ):
        with pytest.raises(UserError, match=said):
            small(**settings)
    for shape in ((1, 1, 6, 8), (1, 3, 8, 8), (1, 1, 8, 8, 8), (1, 1, 0, 8)):
        with pytest.raises(UserError, match=r"multiples of \[4, 4\]"):
            small()(torch.zeros(shape))
    assert isinstance(small(drop_path=0.0).down[0][0].drop_path, nn.Identity)
