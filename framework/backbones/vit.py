"""Vision transformers with a contract of tokens (`lightspan.nn.sequences.token_backbone`): any of timm's, and small
ones.

Shapes: B images, h w their sides, H W grid of patches, T = H W, P prefix tokens, K kept patches, D width.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from timm.layers import SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.init import xavier_uniform_
from lightspan.nn.sequences.patches import grid_of, kept
from lightspan.nn.sequences.positions import sincos as sincos_table
from lightspan.nn.stochastic_depth import Rates, drop_paths

# A recipe may name the class and the function listed here.
__all__ = ["TokenViT", "vit"]


class _Keep(nn.Module):
    """Stands where timm drops patches at random (after positions, before the blocks), and keeps those it is told."""

    def __init__(self, prefix: int, tells_places: bool) -> None:
        super().__init__()
        self.prefix, self.tells_places = prefix, tells_places
        self.places_BK: Tensor | None = None

    def forward(self, tokens_BTD: Tensor) -> Any:
        if self.places_BK is not None:
            tokens_BTD = kept(tokens_BTD, self.places_BK, self.prefix)
        # Eva turns its queries and keys by the positions of these places.
        return (tokens_BTD, self.places_BK) if self.tells_places else tokens_BTD


def _one_of_zeros(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.new_zeros(1, *x.shape[1:])


class TokenViT(nn.Module):
    """A transformer of timm as a `TokenBackbone`: [B C h w] -> [B num_features], which are timm's own, and `tokens`.

    Class token, registers, learned, fixed and rotary positions are the network's; images of other sizes than its own
    need `dynamic_img_size=True` in it. In `tokens` a norm that timm applies after pooling is applied to every token.

    Args:
        network: of timm's VisionTransformer or Eva (EVA, DINOv3), without random dropping of patches; it is changed in
            place.
        mask_token: whether there is a token for hidden patches, starting at N(0, 0.02^2). A method that hides none has
            no use for one, and DDP refuses weights without one.
        sincos: replace learned positions by fixed sines and cosines, as MAE, CAE and I-JEPA do.
    Raises: UserError for another network, or sincos where it does not fit.
    """

    def __init__(self, network: nn.Module, mask_token: bool = False, sincos: bool = False) -> None:
        super().__init__()
        kind: Any = type(network)
        if not isinstance(network, VisionTransformer | Eva) or hasattr(network, "tokens"):
            raise UserError(
                f"TokenViT wraps timm's VisionTransformer or Eva, and network is {kind.__name__}; give it one "
                "of these, or a backbone that has tokens of its own to the method itself"
            )
        if getattr(network.patch_drop, "prob", 0.0):
            raise UserError("TokenViT drops the patches that masks name; make the network with patch_drop_rate=0")
        self.network: Any = network
        self.num_features, self.num_prefix_tokens = network.num_features, network.num_prefix_tokens
        network.patch_drop = _Keep(network.num_prefix_tokens, isinstance(network, Eva))
        self.mask_token = nn.Parameter(torch.randn(network.num_features) * 0.02) if mask_token else None
        if sincos:
            self._fix_positions()

    def _fix_positions(self) -> None:
        positions, network = self.network.pos_embed, self.network
        if positions is None:
            raise UserError("TokenViT sincos=true replaces learned positions, and this network has none")
        prefix = 0 if network.no_embed_class else self.num_prefix_tokens
        table = sincos_table(network.patch_embed.grid_size, self.num_features, prefix)
        network.pos_embed = nn.Parameter(table[None].to(positions), requires_grad=False)

    @property
    def patch_embed(self) -> nn.Module:
        """timm's; tells the patches' sides and the grid of the network's own size."""
        return self.network.patch_embed

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        height, width = self.network.patch_embed.patch_size
        return height, width, self.network.patch_embed.proj.in_channels

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The blocks: one layer of features each, see `lightspan.nn.tokens`."""
        return list(self.network.blocks)

    def cut_behind(self, layer: int) -> None:
        """Drops the blocks behind this one, counted from 0, in place: tokens are then its, after the last norm."""
        self.network.blocks = self.network.blocks[: layer + 1]

    def grid(self, image_BChw: Tensor) -> tuple[int, int]:
        sides, embed = tuple(image_BChw.shape[2:]), self.patch_embed
        height, width = grid_of(sides, embed.patch_size)  # type: ignore[arg-type]
        if not self.network.dynamic_img_size and sides != tuple(embed.img_size):  # type: ignore[arg-type]
            raise UserError(
                f"images of {' x '.join(map(str, sides))} pixels do not fit a network for "
                f"{' x '.join(map(str, embed.img_size))}; let the data give these "  # type: ignore[arg-type]
                "(data.init_args.image_size, or the size of views), or make it with dynamic_img_size=true "
                "(lightspan.backbones.vit.vit: any_size=true)"
            )
        if (given := image_BChw.shape[1]) != (taken := self.patch_shape[2]):
            raise UserError(
                f"images of {given} channels do not fit a network for {taken}; make it with in_chans={given}"
            )
        return height, width

    def tokens(self, image_BChw: Tensor, mask_BHW: Tensor | None = None, keep_BK: Tensor | None = None) -> Tensor:
        self.grid(image_BChw)
        if (
            image_BChw.shape[0] == 0
        ):  # timm cannot tell the shape of tokens of no image, if its images may have any size
            blank, mask_1HW, keep_1K = map(_one_of_zeros, (image_BChw, mask_BHW, keep_BK))
            return self.tokens(blank, mask_1HW, keep_1K)[:0]  # type: ignore[arg-type]
        if mask_BHW is not None and self.mask_token is None:
            raise UserError("patches are to be hidden by a mask token, and this TokenViT has none; set mask_token=true")
        with self._seeing(mask_BHW, keep_BK):
            tokens_BTD = self.network.forward_features(image_BChw)
        return self.network.fc_norm(tokens_BTD)

    def forward(self, image_BChw: Tensor) -> Tensor:
        self.grid(image_BChw)
        if image_BChw.shape[0] == 0:  # len() would make the number of images a constant of an export
            return self.network(_one_of_zeros(image_BChw))[:0]
        return self.network(image_BChw)

    @contextmanager
    def _seeing(self, mask_BHW: Tensor | None, keep_BK: Tensor | None) -> Iterator[None]:
        """Inside, one pass of the network is without what it must not see."""
        hook, keep, token_D = None, self.network.patch_drop, self.mask_token
        if mask_BHW is not None and token_D is not None:
            hook = self.patch_embed.register_forward_hook(
                lambda module, args, patches: torch.where(  # [B T D], or [B H W D] of any size
                    mask_BHW.reshape(*patches.shape[:-1], 1), token_D.to(patches.dtype), patches
                )
            )
        keep.places_BK = keep_BK
        try:
            yield
        finally:
            keep.places_BK = None
            if hook is not None:
                hook.remove()


def vit(
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    img_size: int = 224,
    patch_size: int = 16,
    in_chans: int = 3,
    class_token: bool = True,
    registers: int = 0,
    pool: Literal["token", "avg"] = "token",
    sincos: bool = True,
    mask_token: bool = False,
    layer_scale: float | None = None,
    drop_path: Rates = 0.0,
    any_size: bool = False,
    last_heads: int | None = None,
    swiglu: bool = False,
) -> TokenViT:
    """timm's VisionTransformer of any size, as masked modelling starts it: Xavier-uniform weights, fixed positions.

    Args:
        width, depth, heads: 768, 12 and 12 is ViT-B; width a multiple of heads.
        img_size, patch_size: in pixels; patches fill the image.
        class_token, registers: tokens beside those of patches.
        pool: what `forward` gives: the class token, or the mean over patches. Without a class token it is the mean.
        sincos, mask_token: as in `TokenViT`; without sincos, positions are learned.
        layer_scale: where LayerScale starts; None leaves it out.
        drop_path: share of residual branches that training drops in the last block, rising from 0 in the first; or in
            the first and in the last, such as [0.1, 0.1] for the same in all.
        any_size: take images of other sizes as well, by interpolated positions.
        last_heads: heads of the last block, if it has others than the rest, as UNIP's students do; weights have the
            same shapes whatever it is.
        swiglu: feed-forward layers x -> W3 (silu(W1 x) * W2 x), with about as many weights as others have: 8/3 width
            hidden features, rounded up to a multiple of 8, as in DINOv2's larger networks (Shazeer, 2020, 2002.05202).
    Raises: UserError for sizes that do not fit each other.
    """
    if min(width, depth, heads, patch_size, in_chans) < 1 or width % heads or img_size % patch_size or img_size < 1:
        raise UserError(
            f"vit: width={width} must be a multiple of heads={heads}, img_size={img_size} of patch_size={patch_size}, "
            f"and all and depth={depth} and in_chans={in_chans} above 0"
        )
    if last_heads is not None and (last_heads < 1 or width % last_heads):
        raise UserError(f"vit: width={width} must be a multiple of last_heads={last_heads}, which must be above 0")
    if registers < 0:
        raise UserError(f"vit: registers={registers} must be at least 0")
    drops = drop_paths(drop_path, depth, "vit")
    # timm counts both halves of the first layer, W1 and W2, and rounds down.
    hidden: dict[str, Any] = {}
    if swiglu:
        ratio = (16 * math.ceil(width / 3) + 0.5) / width
        hidden = {"mlp_layer": SwiGLUPacked, "mlp_ratio": ratio, "act_layer": nn.SiLU}
    network = VisionTransformer(
        img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=0, embed_dim=width, depth=depth,
        num_heads=heads, class_token=class_token, reg_tokens=registers, init_values=layer_scale,
        global_pool=pool if class_token else "avg", fc_norm=False, dynamic_img_size=any_size, **hidden,
    )  # fmt: skip
    for block, drop in zip(network.blocks, drops, strict=True):
        block.drop_path1 = block.drop_path2 = drop
    xavier_uniform_(network)
    if last_heads is not None:
        attention = network.blocks[-1].attn
        attention.num_heads, attention.head_dim = last_heads, width // last_heads
        attention.scale = attention.head_dim**-0.5
    return TokenViT(network, mask_token, sincos)
