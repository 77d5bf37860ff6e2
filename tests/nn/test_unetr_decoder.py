"""UNETR's decoder: monai's blocks with its weights, sides that do not halve, any number of axes, and settings."""

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.nn.decoders.unetr_decoder import ResidualConvolutions, UNETRDecoder


def test_a_step_is_that_of_monai() -> None:
    blocks = pytest.importorskip("monai.networks.blocks")
    torch.manual_seed(0)
    ours = UNETRDecoder([6, 12], 3, (2, 2, 2))
    theirs = blocks.UnetrUpBlock(3, 12, 6, 3, 2, "instance", res_block=True)
    with torch.no_grad():
        theirs.transp_conv.conv.weight.copy_(ours.enlarge[0].weight)
        join = ours.join[0]
        pairs = ((theirs.conv_block.conv1, join.first), (theirs.conv_block.conv2, join.second),
                 (theirs.conv_block.conv3, join.shortcut))  # fmt: skip
        for their, our in pairs:
            their.conv.weight.copy_(our.weight)
    fine, coarse = torch.randn(2, 6, 4, 6, 8), torch.randn(2, 12, 2, 3, 4)
    found = join(torch.cat([ours.enlarge[0](coarse), fine], dim=1))
    torch.testing.assert_close(found, theirs(coarse, fine), atol=1e-5, rtol=1e-5)


def test_maps_of_samples_of_one_to_three_axes_that_sides_do_not_fill() -> None:
    for patch, grids, sides in (
        ((4,), [(5,), (3,), (2,)], (18,)),
        ((2, 3), [(3, 4), (2, 2), (1, 1)], (5, 11)),
        ((4, 4, 4), [(1, 1, 2), (1, 1, 1), (1, 1, 1)], (4, 3, 8)),
    ):
        decoder = UNETRDecoder([4, 8, 16], 3, patch)
        maps = [torch.randn(2, width, *grid) for width, grid in zip([4, 8, 16], grids, strict=True)]
        found = decoder(maps, sides)
        assert found.shape == (2, 3, *sides)
        found.square().sum().backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in decoder.parameters())
        one = decoder([each[:1] for each in maps], sides)
        torch.testing.assert_close(one, found[:1])  # samples do not see one another
    constant = ResidualConvolutions(4, 4, 3)(torch.ones(1, 4, 1, 1, 1))
    assert torch.equal(constant, torch.ones(1, 4, 1, 1, 1))  # of a single place nothing but the shortcut is left
    half = UNETRDecoder([4], 2, (2, 2)).bfloat16()
    assert half([torch.randn(1, 4, 3, 3).bfloat16()], (6, 6)).isfinite().all()


def test_settings_that_do_not_fit_are_named() -> None:
    for settings, said in (
        ({"widths": []}, "widths="), ({"widths": [1, 2]}, "widths="), ({"widths": [4], "out_chans": 0}, "out_chans=0"),
        ({"widths": [4], "patch": ()}, "patch="), ({"widths": [4], "patch": (2, 0)}, "patch="),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            UNETRDecoder(**settings)
