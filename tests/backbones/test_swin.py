"""Swin transformers as token backbones: whose tokens they give, what a hidden cell shows, what is refused."""

from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from lightspan.backbones.swin import TokenSwin, swin
from lightspan.core.errors import UserError
from lightspan.nn.sequences.token_backbone import require_tokens
from lightspan.nn.tokens import token_features


def network(**settings: Any) -> SwinTransformer:
    """Cells of 4 x 4 pixels, in windows of 4 x 4 positions."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 2, "in_chans": 1, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)}
    return SwinTransformer(window_size=4, **sizes | settings).eval()


def images(rows: int = 2, side: int = 32) -> torch.Tensor:
    return torch.randn(rows, 1, side, side, generator=torch.Generator().manual_seed(1))


def test_tokens_are_those_of_the_last_stage_and_features_their_mean() -> None:
    plain = network(num_classes=5)
    expected = plain.forward_features(images())
    pooled = plain.forward_head(expected, pre_logits=True)
    backbone = TokenSwin(plain)
    assert require_tokens(backbone, "it") is backbone
    assert (backbone.patch_shape, backbone.grid(images()), backbone.num_features) == ((4, 4, 1), (8, 8), 16)
    torch.testing.assert_close(backbone.tokens(images()).unflatten(1, (8, 8)), expected)
    torch.testing.assert_close(backbone(images()), pooled)


def test_nothing_depends_on_the_pixels_of_hidden_cells_and_a_hidden_cell_counts() -> None:
    backbone = TokenSwin(network(), mask_token=True)
    mask = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.6
    of_pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    hidden = backbone.tokens(images(), mask_BHW=mask)
    changed = torch.where(of_pixels, torch.randn(2, 1, 32, 32), images())
    assert torch.equal(backbone.tokens(changed, mask_BHW=mask), hidden)
    assert not torch.equal(backbone.tokens(torch.where(of_pixels, images(), 0.0), mask_BHW=mask), hidden)
    torch.testing.assert_close(backbone.tokens(images(), mask_BHW=torch.zeros_like(mask)), backbone.tokens(images()))
    assert not torch.allclose(backbone.tokens(images()), hidden)
    hidden.sum().backward()
    assert backbone.mask_token is not None
    assert backbone.mask_token.grad.abs().max() > 0


def test_layers_are_the_stages() -> None:
    backbone = TokenSwin(network())
    first, last = token_features(backbone, lambda: backbone(images()), (0, -1))
    assert (first.grid, last.grid) == ((16, 16), (8, 8))
    assert (first.tokens_BTD.shape, last.tokens_BTD.shape) == ((2, 256, 8), (2, 64, 16))


def test_the_paper_s_network_hides_cells_of_32_pixels() -> None:
    with torch.device("meta"):
        backbone = swin(mask_token=True)
    assert backbone.patch_shape == (32, 32, 3)
    assert backbone.num_features == 1024
    assert sum(p.numel() for p in backbone.parameters()) == 86_743_224 + 128


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="network is VisionTransformer"):
        TokenSwin(VisionTransformer(img_size=8, patch_size=2, embed_dim=8, depth=1, num_heads=2))
    with pytest.raises(UserError, match="images of 28 x 28 pixels do not fit a Swin transformer for 32 x 32"):
        TokenSwin(network()).tokens(images(side=28))
    with pytest.raises(UserError, match="sees whole windows, so single patches cannot be left out"):
        TokenSwin(network()).tokens(images(), keep_BK=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(UserError, match="this TokenSwin has none; set mask_token=true"):
        TokenSwin(network()).tokens(images(), mask_BHW=torch.zeros(2, 8, 8, dtype=torch.bool))
    with pytest.raises(UserError, match="timm has no Swin transformer named 'swin_gross'"):
        swin("swin_gross")
    with pytest.raises(UserError, match="img_size=100 must be a multiple of 32"):
        swin(img_size=100)
