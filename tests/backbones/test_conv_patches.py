"""Patches through convolutions: their grid, what each sees, and that a transformer takes them."""

import pytest
import torch

from lightspan.backbones.conv_patches import ConvPatches, column_vit
from lightspan.backbones.vit import TokenViT
from lightspan.core.errors import UserError


def backbone() -> TokenViT:
    torch.manual_seed(0)
    return column_vit((8, 24), 4, in_chans=1, width=8, depth=1, heads=2)


def test_a_transformer_takes_them_and_tells_their_grid_and_shape() -> None:
    made, image = backbone(), torch.randn(2, 1, 8, 24)
    assert made.patch_shape == (8, 4, 1)
    assert made.grid(image) == (1, 6)
    tokens = made.tokens(image)
    assert tokens.shape == (2, 6, 8)
    torch.testing.assert_close(made(image), tokens.mean(dim=1))
    tokens.square().sum().backward()
    assert all(weight.grad is not None for weight in made.patch_embed.parameters())


def test_a_patch_sees_itself_and_margins_of_its_neighbours() -> None:
    patches = ConvPatches((8, 24), (8, 4), 1, 8).eval()
    image = torch.randn(1, 1, 8, 24, requires_grad=True)
    patches(image)[0, 2].sum().backward()
    seen = image.grad[0, 0].abs().amax(dim=0).nonzero().flatten()  # type: ignore[index]
    assert (int(seen.min()), int(seen.max())) == (1, 15)  # its own columns are 8 to 11
    assert ConvPatches((8, 8), 8, 1, 8)(image[..., :8]).shape == (1, 1, 8)


def test_patches_of_sides_that_convolutions_do_not_fill_are_refused() -> None:
    with pytest.raises(UserError, match=r"patch_size=6 x 4: sides must be multiples of 4"):
        ConvPatches((12, 12), (6, 4), 1, 8)
    with pytest.raises(UserError, match=r"8 x 10 cannot be cut into patches of 8 x 4"):
        column_vit((8, 10), 4)
    with pytest.raises(UserError, match=r"width=9 must be a multiple of 4 and of heads=3"):
        column_vit((8, 8), 4, width=9, heads=3)
