"""What a backbone of tokens offers: the one contract of masked modelling, of self-distillation by patches, and of dense
features.

`lightspan.backbones.vit.TokenViT` gives it to timm's transformers, and `lightspan.backbones.elastic.ElasticViT` has it.
Shapes: B images, h w their sides, H W grid of patches, T = H W, P prefix tokens (class token first, then registers),
K patches that are seen, D width.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from lightspan.errors import UserError


@runtime_checkable
class TokenBackbone(Protocol):
    """A network that says something of each patch.

    Attributes:
        num_features: D.
        num_prefix_tokens: P, >= 0.
    """

    num_features: int
    num_prefix_tokens: int

    def grid(self, image_BChw: Tensor) -> tuple[int, int]:
        """(H, W) of these images. Raises: UserError for sides that the network does not take."""

    def tokens(self, image_BChw: Tensor, mask_BHW: Tensor | None = None, keep_BK: Tensor | None = None) -> Tensor:
        """Tokens after the last norm, the prefix first: [B P+T D], or [B P+K D] of the kept patches.

        Args:
            mask_BHW: bool; where it is True the network sees a learned mask token in the place of the patch.
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
