"""DALL-E's tokenizer, untrained: one code for each patch, from pixels as its training had them."""

import pytest
import torch
from torch import nn

from lightspan.backbones.dalle import DalleCodes
from lightspan.core.errors import UserError


@pytest.mark.sweep  # for the time that the import takes
def test_each_patch_has_one_code_of_its_pixels() -> None:
    torch.manual_seed(0)
    tokenizer, seen = DalleCodes(None, patch=16), []
    tokenizer.network.get_codebook_indices = lambda pixels: (  # type: ignore[method-assign]
        seen.append(pixels) or pixels.new_zeros((2, 2, 3), dtype=torch.int64)  # type: ignore[func-returns-value]
    )
    image = torch.rand(2, 3, 32, 48)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    codes = tokenizer((image - mean[:, None, None]) / std[:, None, None])
    assert codes.shape == (2, 6)
    assert seen[0].shape == (2, 3, 16, 24)
    assert seen[0].min() >= 0.1
    assert seen[0].max() <= 0.9
    assert not {"mean", "std"} & tokenizer.state_dict().keys()
    white = tokenizer((torch.ones(1, 3, 16, 16) - mean[:, None, None]) / std[:, None, None])
    assert white.shape == (2, 6)
    torch.testing.assert_close(seen[1], torch.full((1, 3, 8, 8), 0.9))


@pytest.mark.sweep
def test_patches_left_out_are_those_of_a_backbone_if_they_are_square_and_in_colour() -> None:
    codes = DalleCodes.__new__(DalleCodes)  # without its network of 100 million weights
    nn.Module.__init__(codes)
    codes.patch = None
    for shape in ((4, 2, 3), (4, 4, 1)):
        with pytest.raises(UserError, match="made for square patches of any pixels in 3 channels"):
            codes.set_patch_shape(shape)
    codes.set_patch_shape((4, 4, 3))
    assert codes.patch == 4
    with pytest.raises(UserError, match="square patches of 4 pixels"):
        codes.set_patch_shape((8, 8, 3))
