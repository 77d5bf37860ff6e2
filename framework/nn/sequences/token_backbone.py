"""What a backbone of tokens offers: the one contract of masked modelling, of self-distillation by patches, and of dense
features.

`lightspan.backbones.vit.TokenViT` gives it to timm's transformers, `lightspan.backbones.swin.TokenSwin` to its Swin
transformers, and `lightspan.backbones.elastic.ElasticViT` and the networks of `lightspan.backbones.placed_vit` have it.
Shapes: B samples, h w their sides, H W grid of patches, T its patches, P prefix tokens (class token first, then
registers), K patches that are seen, D width. Letters are those of images: h w and H W stand for as many axes as samples
have, one for series and three for volumes and clips.
"""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.widths import build_outputs, require_width


@runtime_checkable
class TokenBackbone(Protocol):
    """A network that says something of each patch.

    Attributes:
        num_features: D.
        num_prefix_tokens: P, >= 0.
        patch_shape: sides of a patch in pixels, and the channels of samples.
    """

    num_features: int
    num_prefix_tokens: int

    @property
    def patch_shape(self) -> tuple[int, ...]: ...

    def grid(self, image_BChw: Tensor) -> tuple[int, ...]:
        """(H, W) of these samples. Raises: UserError for sides that the network does not take."""

    def tokens(self, image_BChw: Tensor, mask_BHW: Tensor | None = None, keep_BK: Tensor | None = None) -> Tensor:
        """Tokens after the last norm, the prefix first: [B P+T D], or [B P+K D] of the kept patches.

        Args:
            mask_BHW: bool; where it is True the network sees a learned mask token in place of the patch.
            keep_BK: int64, places of the only patches that the network gets to see, counted row by row; their tokens
                come in this order.
        """


def require_tokens(backbone: nn.Module, method: str) -> TokenBackbone:
    """The backbone, as what it has to be. Raises: UserError for one without the contract."""
    if not isinstance(backbone, TokenBackbone):
        raise UserError(
            f"{method} needs a backbone with tokens and a grid, and {type(backbone).__name__} has none; use "
            "lightspan.backbones.vit.vit, or lightspan.backbones.vit.TokenViT around a transformer of timm"
        )
    return backbone


def require_class_token(backbone: nn.Module, method: str) -> TokenBackbone:
    """As `require_tokens`. Raises: UserError for a backbone without a class token too."""
    tokens = require_tokens(backbone, method)
    if tokens.num_prefix_tokens < 1:
        raise UserError(f"{method} contrasts class tokens, and this backbone has none; set class_token=true")
    return tokens


def patch_tokens(
    backbone: nn.Module, image_BChw: Tensor, mask_BHW: Tensor | None = None, keep_BK: Tensor | None = None
) -> Tensor:
    """`TokenBackbone.tokens` without the prefix, which networks may lack: [B T D], or [B K D] of the kept patches."""
    tokens_BPD = backbone.tokens(image_BChw, mask_BHW=mask_BHW, keep_BK=keep_BK)  # type: ignore[operator]
    return tokens_BPD[:, backbone.num_prefix_tokens :]


def settle_patch_decoder(backbone: nn.Module, decoder: nn.Module, method: str) -> None:
    """Lets a decoder give as many numbers as a patch of the backbone has, if that was left open, and compares the two.

    Args:
        decoder: with `in_features` and `out_features`.
    Raises: UserError for other numbers, or a backbone without tokens.
    """
    *sides, channels = shape = require_tokens(backbone, method).patch_shape
    require_width(backbone, "decoder.in_features", getattr(decoder, "in_features", None))
    build_outputs(decoder, math.prod(shape))
    given = getattr(decoder, "out_features", None)
    if given != math.prod(shape):
        raise UserError(
            f"decoder.out_features={given}, and a patch of {' x '.join(map(str, sides))} pixels with "
            f"{channels} channels has {math.prod(shape)} numbers; set it to that, or leave it out"
        )


class AllTokens(nn.Module):
    """A backbone whose call gives its tokens, for what wraps a module and calls it, such as a teacher."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image_BChw: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """See `TokenBackbone.tokens`."""
        return self.backbone.tokens(image_BChw, keep_BK=keep_BK)  # type: ignore[operator]


class ClassAndPatches(NamedTuple):
    """Embeddings of class tokens, and tokens of patches."""

    z_BE: Tensor
    patches_BTD: Tensor


class ClassTokenNetwork(nn.Module):
    """A transformer and a projector of its class token, whose patches others read: what MMC and SiT train and copy."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, image_BChw: Tensor) -> ClassAndPatches:
        """Embeddings [B E] and tokens [B T D] of images [B C h w]."""
        tokens_BPD = self.backbone.tokens(image_BChw)  # type: ignore[operator]
        return ClassAndPatches(self.projector(tokens_BPD[:, 0]), tokens_BPD[:, self.backbone.num_prefix_tokens :])


class SeenPatches(NamedTuple):
    """The mean over the tokens of patches, its embedding, and these tokens."""

    mean_BD: Tensor
    z_BE: Tensor
    patches_BTD: Tensor


class PatchMeanNetwork(nn.Module):
    """A backbone of tokens and a projector of the mean over its patches, which networks without a class token have too:
    what a method trains and copies.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, image_BChw: Tensor, mask_BHW: Tensor | None = None) -> SeenPatches:
        """Arguments as in `TokenBackbone.tokens`."""
        patches_BTD = patch_tokens(self.backbone, image_BChw, mask_BHW)
        mean_BD = patches_BTD.mean(dim=1)
        return SeenPatches(mean_BD, self.projector(mean_BD), patches_BTD)


class ClassAndMean(nn.Module):
    """A backbone for fine-tuning: its class token and the mean of its patches side by side, [B C h w] -> [B 2 D].

    Source: the code of SiT (Atito et al., 2021, arXiv 2104.03602), whose classifiers read both.
    Raises: UserError for a backbone without a class token.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.num_features = 2 * require_class_token(backbone, "ClassAndMean").num_features
        self.backbone = backbone

    def forward(self, image_BChw: Tensor) -> Tensor:
        tokens_BPD = self.backbone.tokens(image_BChw)  # type: ignore[operator]
        patches_BTD = tokens_BPD[:, self.backbone.num_prefix_tokens :]
        return torch.cat([tokens_BPD[:, 0], patches_BTD.mean(dim=1)], dim=1)
