"""A transformer whose class tokens and masked patches heads score: the networks of iBOT and POA, of DINO with a
transformer, and, with a head for each of both, of DINOv2.

A network without tokens, such as a ResNet, has no masked patches to score and does not fit; its methods call
`lightspan.nn.multi_crop.one_pass_a_size` and their heads themselves.
Shapes: V views of B images, the first G of them with masks, R = G B; H W grid of patches, T = H W, w width of the
tokens, K prototypes of a head, N masked patches.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.heads.dino_head import DINOHead
from lightspan.nn.masking.block_masks import MaskedPatches
from lightspan.nn.multi_crop import one_pass_a_size
from lightspan.nn.sequences.token_backbone import require_class_token, require_tokens
from lightspan.nn.slices import widened
from lightspan.nn.taps import tapped
from lightspan.nn.widths import require_width


class SeenViews(NamedTuple):
    """What a network says of its views: class tokens, and by head the scores of these and of masked patches."""

    class_VBw: Tensor
    scores_VBK: list[Tensor]
    patches_NK: list[Tensor]

    @property
    def by_head(self) -> list[tuple[Tensor, Tensor]]:
        """Scores of class tokens and of masked patches."""
        return [*zip(self.scores_VBK, self.patches_NK, strict=True)]


class SeenTokens(NamedTuple):
    """Class tokens of all views, patches of the first G, and those of these that are masked."""

    class_VBw: Tensor
    patches_RTw: Tensor
    masked_Nw: Tensor


def seen_tokens(
    backbone: nn.Module, views: Sequence[Tensor], masked: MaskedPatches, count: int, hide: bool, **options: Any
) -> SeenTokens:
    """One pass of a backbone of tokens for each run of views of one size.

    Args:
        views: row b of all comes from image b; a rank may have no image.
        masked: patches of the first `count` views.
        hide: whether the network has to guess what they show.
        options: handed to `tokens` of the backbone.
    """
    tokens, images = backbone.tokens, len(views[0])
    mask_BHW = masked.hidden_BHW if hide else None
    tokens_RTw = tokens(torch.cat([*views[:count]]), mask_BHW=mask_BHW, **options)  # type: ignore[operator]
    others = one_pass_a_size(lambda image_BChw: tokens(image_BChw, **options)[:, 0], views[count:])  # type: ignore[operator]
    class_VBw = torch.cat([tokens_RTw[:, 0], *others]).unflatten(0, (len(views), images))
    patches_RTw = tokens_RTw[:, backbone.num_prefix_tokens :]
    return SeenTokens(class_VBw, patches_RTw, masked.tokens(patches_RTw))


class PrototypeNetwork(nn.Module):
    """One pass of the backbone for each run of views of one size, then all heads on what it gives.

    Args:
        backbone: a `lightspan.nn.sequences.token_backbone.TokenBackbone` with a class token and a mask token, such as
            `lightspan.backbones.vit.TokenViT` or `lightspan.backbones.elastic.ElasticViT`. Tokens may be narrower than
            `num_features`, and are then filled up by `lightspan.nn.slices.widened`.
        heads: [..., num_features] -> [..., K], at least one. Class tokens and patches share them.
        masked_views: G, at least 1.
    Raises: UserError for a backbone without tokens, or without a class token; for no head, or one of another width.
    """

    def __init__(self, backbone: nn.Module, heads: Sequence[DINOHead], masked_views: int) -> None:
        super().__init__()
        if require_tokens(backbone, "PrototypeNetwork").num_prefix_tokens < 1:
            raise UserError("PrototypeNetwork scores the class token, and this backbone has none; set class_token=true")
        widths, given = [head.in_features for head in heads], backbone.num_features
        if not heads or set(widths) != {given}:
            raise UserError(
                f"heads take {widths} features, and {type(backbone).__name__} gives {given}; give one head or more "
                f"with in_features={given}"
            )
        self.backbone, self.heads, self.masked_views = backbone, nn.ModuleList(heads), masked_views

    @property
    def prototypes(self) -> list[nn.Module]:
        return [head.prototypes for head in self.heads]  # type: ignore[misc]

    def bottleneck(self, features_BD: Tensor) -> Tensor:
        """What the first head's prototypes are compared with, [B R]."""
        head = self.heads[0]
        with tapped([head.mlp]) as outputs:  # type: ignore[list-item]
            head(features_BD)  # called itself, so that FSDP2 gathers it
        return outputs[0]

    def forward(self, views: Sequence[Tensor], masked: MaskedPatches, hide: bool, **options: Any) -> SeenViews:
        """Scores of all class tokens and of the masked patches.

        Args:
            views: row b of all comes from image b; a rank may have no image.
            masked: patches that are scored, of the first G views.
            hide: whether the network has to guess what they show.
            options: handed to `tokens` of the backbone.
        """
        shape = len(views), len(views[0])
        class_VBw, _, masked_Nw = seen_tokens(self.backbone, views, masked, self.masked_views, hide, **options)
        rows = widened(torch.cat([class_VBw.flatten(0, 1), masked_Nw]), self.backbone.num_features)  # type: ignore[arg-type]
        scores = [head(rows).split([shape[0] * shape[1], len(masked_Nw)]) for head in self.heads]
        return SeenViews(class_VBw, [of_class.unflatten(0, shape) for of_class, _ in scores], [of for _, of in scores])


class SeenByTwo(NamedTuple):
    """What a network with two heads says of its views: class tokens of all and patches of the first G, scores of class
    tokens by the first head, and of masked patches by the second.
    """

    class_VBw: Tensor
    patches_RTw: Tensor
    scores_VBK: Tensor
    masked_NK: Tensor

    @property
    def by_head(self) -> list[tuple[Tensor, Tensor]]:
        """The scores as those of one head that both share, see `SeenViews`."""
        return [(self.scores_VBK, self.masked_NK)]


class TwoHeadNetwork(nn.Module):
    """One pass of the backbone for each run of views of one size, then a head on class tokens and another on masked
    patches, which share no weight (DINOv2, arXiv 2304.07193, section 4, "untying head weights").

    Args:
        backbone: a `lightspan.nn.sequences.token_backbone.TokenBackbone` with a class token and a mask token.
        head, patch_head: [..., num_features] -> [..., K], each with a K of its own.
        masked_views: G, at least 1.
        method: its name, for messages.
    Raises: UserError for a backbone without tokens or class token, for a head of another width, or one for both.
    """

    def __init__(
        self, backbone: nn.Module, head: DINOHead, patch_head: DINOHead, masked_views: int, method: str
    ) -> None:
        super().__init__()
        require_class_token(backbone, method)
        require_width(backbone, "head.in_features", head.in_features)
        require_width(backbone, "patch_head.in_features", patch_head.in_features)
        if head is patch_head:
            raise UserError(f"{method} scores class tokens and patches by two heads, and head and patch_head are one")
        self.backbone, self.head, self.patch_head, self.masked_views = backbone, head, patch_head, masked_views

    @property
    def prototypes(self) -> list[nn.Module]:
        return [self.head.prototypes, self.patch_head.prototypes]

    def forward(self, views: Sequence[Tensor], masked: MaskedPatches, hide: bool) -> SeenByTwo:
        """Arguments as in `seen_tokens`."""
        class_VBw, patches_RTw, masked_Nw = seen_tokens(self.backbone, views, masked, self.masked_views, hide)
        return SeenByTwo(class_VBw, patches_RTw, self.head(class_VBw), self.patch_head(masked_Nw))
