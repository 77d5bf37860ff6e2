"""A vision transformer that also runs at every smaller width and depth, on a part of its own weights.

Source: Zhang et al., "POA: Pre-training Once for Models of All Sizes", ECCV 2024, arXiv 2408.01031, section 3.2; what
part of a weight a narrow network has is said in `lightspan.nn.slices`.
Shapes: B images, C channels, H W grid of patches, T = 1 + H W tokens, K kept patches, w width.
"""

from functools import partial
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightspan.backbones.timm_networks import timm_network
from lightspan.core.errors import UserError
from lightspan.nn.sequences.patches import grid_of, kept
from lightspan.nn.sequences.positions import resampled
from lightspan.nn.slices import first, sub_weights
from lightspan.nn.subnets import Size

# A recipe may name the class listed here.
__all__ = ["ElasticViT"]

ARCHITECTURE = "vit_base_patch16_224"
"""timm's name for the family; all of its sizes are given anew."""


def chosen_blocks(depth: int, of: int) -> list[int]:
    """Which of `of` blocks a network of `depth` has: evenly spread, first and last included."""
    return [0] if depth == 1 else [place * (of - 1) // (depth - 1) for place in range(depth)]


class ElasticBlock(Block):
    """timm's block that takes tokens of fewer channels as well, and then runs on a part of its weights."""

    def __init__(self, dim: int, num_heads: int, rate: float, **settings: Any) -> None:
        settings |= {"drop_path": rate}  # timm's own rates rise with depth
        super().__init__(dim, num_heads, **settings)
        self.dim, self.head_dim, self.settings = dim, dim // num_heads, settings
        self.narrow: dict[int, Block] = {}  # made when they are wanted; without weights of their own

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        width = x.shape[-1]
        if width == self.dim:
            return super().forward(x, *args, **kwargs)
        if width not in self.narrow:
            self.narrow[width] = Block(width, width // self.head_dim, **self.settings | {"device": "meta"})
        block = self.narrow[width].train(self.training)
        return functional_call(block, sub_weights(self, block), (x, *args), kwargs)


class ElasticViT(VisionTransformer):
    """timm's vision transformer with a class token, a token for masked patches, and networks of smaller sizes inside.

    Without a size it is timm's network: [B C h w] -> the class token [B num_features]. Images of other sizes than
    `img_size` get position embeddings that are interpolated; sides are multiples of `patch_size`.

    Args:
        widths, depths: of the networks inside, in increasing order; the last ones are its own. Widths are multiples of
            `head_dim`.
        head_dim: channels of each attention head, the same at every width.
        img_size, patch_size, in_chans: as timm's.
        init_values: where LayerScale starts; None leaves it out.
        drop_path: share of the residual branches that training drops, the same for all blocks, as in the authors' code.
        weight_init: as timm's: "" draws from N(0, 0.02^2), "jax" after Xavier, which suits narrow networks.
    Raises: UserError for sizes that cannot be cut.
    """

    def __init__(
        self,
        widths: list[int],
        depths: list[int],
        head_dim: int = 64,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        init_values: float | None = 1e-5,
        drop_path: float = 0.0,
        weight_init: Literal["", "jax"] = "",
    ) -> None:
        for name, sizes in (("widths", widths), ("depths", depths)):
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise UserError(f"ElasticViT {name}={list(sizes)} must be whole numbers above 0 in increasing order")
        if head_dim < 1 or any(width % head_dim for width in widths):
            raise UserError(f"ElasticViT widths={list(widths)} must be multiples of head_dim={head_dim}")
        if patch_size < 1 or img_size < 1 or img_size % patch_size or in_chans < 1:
            raise UserError(
                f"ElasticViT img_size={img_size} must be a multiple of patch_size={patch_size}, and both and "
                f"in_chans={in_chans} above 0"
            )
        if not 0 <= drop_path < 1:
            raise UserError(f"ElasticViT drop_path={drop_path} is a share of branches and must lie in [0, 1)")
        self.common: dict[str, Any] = {
            "img_size": img_size, "patch_size": patch_size, "in_chans": in_chans, "init_values": init_values
        }  # fmt: skip
        self.widths, self.depths, self.head_dim = list(widths), list(depths), head_dim
        make_block = partial(ElasticBlock, rate=drop_path)
        super().__init__(**self.settings(self.largest), block_fn=make_block, weight_init=weight_init)
        self.mask_token = nn.Parameter(torch.zeros(widths[-1]))

    @property
    def largest(self) -> Size:
        return Size(self.widths[-1], self.depths[-1])

    @property
    def sizes(self) -> list[Size]:
        """All networks inside, the whole one last."""
        return [Size(width, depth) for width in self.widths for depth in self.depths]

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """Height and width of a patch in pixels, and the channels of images."""
        height, width = self.patch_embed.patch_size
        return height, width, self.common["in_chans"]

    def settings(self, size: Size) -> dict[str, Any]:
        """What makes timm's VisionTransformer of this size."""
        sides = {"embed_dim": size.width, "depth": size.depth, "num_heads": size.width // self.head_dim}
        return self.common | sides | {"num_classes": 0}

    def grid(self, image_BChw: Tensor) -> tuple[int, int]:
        """(H, W) of these images. Raises: UserError for an image whose sides the patches do not fill."""
        height, width = grid_of(image_BChw.shape[2:], self.patch_embed.patch_size)
        return height, width

    def tokens(
        self,
        image_BChw: Tensor,
        size: Size | None = None,
        mask_BHW: Tensor | None = None,
        keep_BK: Tensor | None = None,
    ) -> Tensor:
        """Tokens after the last norm, the class token first: [B T w]; see `lightspan.nn.sequences.token_backbone`.

        Args:
            size: one of `sizes`, or any other up to the whole one; None is the whole network.
            mask_BHW: bool, patches that are replaced by the mask token.
            keep_BK: int64, places of the only patches that are seen.
        """
        width, depth = size or self.largest
        x_BTw = self.embed(image_BChw, width, mask_BHW)
        if keep_BK is not None:
            x_BTw = kept(x_BTw, keep_BK, prefix=1)
        for place in chosen_blocks(depth, len(self.blocks)):
            x_BTw = self.blocks[place](x_BTw)
        weight, bias = first(self.norm.weight, (width,)), first(self.norm.bias, (width,))
        return F.layer_norm(x_BTw, (width,), weight, bias, self.norm.eps)

    def embed(self, image_BChw: Tensor, width: int, mask_BHW: Tensor | None = None) -> Tensor:
        """Patches, class token and positions: [B T w]. Patches are not scaled: their inputs are all there.

        Raises: UserError for an image whose sides the patches do not fill.
        """
        self.grid(image_BChw)
        projection, positions = self.patch_embed.proj, self.pos_embed[..., :width]
        weight, bias = projection.weight[:width], projection.bias[:width]
        x_BHWw = F.conv2d(image_BChw, weight, bias, projection.stride).permute(0, 2, 3, 1)
        if mask_BHW is not None:
            x_BHWw = torch.where(mask_BHW[..., None], self.mask_token[:width].to(x_BHWw.dtype), x_BHWw)
        places_Tw = resampled(positions[0, 1:], self.patch_embed.grid_size, x_BHWw.shape[1:3])
        x_BTw = torch.cat([self.cls_token[..., :width].expand(x_BHWw.shape[0], -1, -1), x_BHWw.flatten(1, 2)], dim=1)
        return x_BTw + torch.cat([positions[0, :1], places_Tw])

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        assert attn_mask is None, "an image's patches all see one another"
        return self.tokens(x)

    @torch.no_grad()
    def extract(self, size: Size) -> VisionTransformer:
        """The network of this size by itself, a plain timm network with weights of its own.

        Raises: UserError for a size that is not in here.
        """
        if size not in self.sizes:
            raise UserError(
                f"no network {size} in here; widths are {', '.join(map(str, self.widths))} and depths "
                f"{', '.join(map(str, self.depths))}"
            )
        network: VisionTransformer = timm_network(ARCHITECTURE, **self.settings(size))
        places = {
            f"blocks.{new}": f"blocks.{old}" for new, old in enumerate(chosen_blocks(size.depth, self.depths[-1]))
        }

        def source(path: str) -> str:
            block, rest = ".".join(path.split(".")[:2]), path.split(".")[2:]
            return ".".join([places[block], *rest]) if block in places else path

        network.load_state_dict(sub_weights(self, network, source))
        return network.train(self.training)

    def no_weight_decay(self) -> set[str]:
        return {*super().no_weight_decay(), "mask_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The mask token is of the stem."""
        told = super().group_matcher(coarse)
        return told | {"stem": f"^mask_token|{told['stem'].removeprefix('^')}"}
