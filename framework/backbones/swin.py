"""Swin transformers with a contract of tokens (`lightspan.nn.sequences.token_backbone`): timm's, seen at the stride of
their last stage.

Source: Xie et al., "SimMIM", CVPR 2022, arXiv 2111.09886, section 3.2: what is hidden are cells as large as the stride
of the last stage, 32 x 32 pixels, and a learned token stands for all that the patch embedding gave of them.
Shapes: B images, h w their sides, H W grid of cells, T = H W, D width of the last stage.
"""

from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from lightspan.backbones.timm_networks import timm_network
from lightspan.core.errors import UserError
from lightspan.nn.sequences.patches import cells_to_pixels, grid_of

# A recipe may name the class and the function listed here.
__all__ = ["TokenSwin", "swin"]


class TokenSwin(nn.Module):
    """A Swin transformer of timm as a `TokenBackbone`: [B C h w] -> [B num_features], the mean over cells, and
    `tokens`. A patch of the contract is a cell of the last stage.

    Args:
        network: of timm's SwinTransformer, for images of one size; its classifier is left out.
        mask_token: whether there is a token for hidden cells, starting at N(0, 0.02^2). A method that hides none has no
            use for one, and DDP refuses weights without one.
    Raises: UserError for another network.
    """

    num_prefix_tokens = 0
    output_fmt = "NHWC"  # timm's name for the axes of what a stage gives

    def __init__(self, network: nn.Module, mask_token: bool = False) -> None:
        super().__init__()
        if not isinstance(network, SwinTransformer):
            raise UserError(f"TokenSwin wraps timm's SwinTransformer, and network is {type(network).__name__}")
        network.reset_classifier(0)
        self.network: Any = network
        self.num_features: int = network.num_features
        width = network.patch_embed.proj.out_channels
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02) if mask_token else None

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        stride = self.network.feature_info[-1]["reduction"]
        return stride, stride, self.network.patch_embed.proj.in_channels

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The stages: one layer of features each, see `lightspan.nn.tokens`."""
        return list(self.network.layers)

    def grid(self, image_BChw: Tensor) -> tuple[int, int]:
        sides, own = tuple(image_BChw.shape[2:]), tuple(self.network.patch_embed.img_size)
        height, width = grid_of(sides, self.patch_shape[:2])
        if sides != own:
            raise UserError(
                f"images of {' x '.join(map(str, sides))} pixels do not fit a Swin transformer for "
                f"{' x '.join(map(str, own))}; make it for that size (lightspan.backbones.swin.swin: img_size)"
            )
        return height, width

    def tokens(self, image_BChw: Tensor, mask_BHW: Tensor | None = None, keep_BK: Tensor | None = None) -> Tensor:
        self.grid(image_BChw)
        if keep_BK is not None:
            raise UserError(
                "a Swin transformer sees whole windows, so single patches cannot be left out of it; take a method that "
                "hides them by a mask token, or lightspan.backbones.vit.vit"
            )
        if mask_BHW is None:
            return self.network.forward_features(image_BChw).flatten(1, 2)
        if self.mask_token is None:
            raise UserError("cells are to be hidden by a mask token, and this TokenSwin has none; set mask_token=true")
        hook = self.network.patch_embed.register_forward_hook(
            lambda module, args, map_BhwC: self._hidden(map_BhwC, mask_BHW)
        )
        try:
            return self.network.forward_features(image_BChw).flatten(1, 2)
        finally:
            hook.remove()

    def _hidden(self, map_BhwC: Tensor, mask_BHW: Tensor) -> Tensor:
        cell = [side // count for side, count in zip(map_BhwC.shape[1:3], mask_BHW.shape[1:], strict=True)]
        mask_Bhw1 = cells_to_pixels(mask_BHW, cell)[..., None]
        assert self.mask_token is not None
        return torch.where(mask_Bhw1, self.mask_token.to(map_BhwC.dtype), map_BhwC)

    def forward(self, image_BChw: Tensor) -> Tensor:
        return self.tokens(image_BChw).mean(dim=1)


def swin(
    name: str = "swin_base_patch4_window7_224",
    img_size: int = 224,
    in_chans: int = 3,
    mask_token: bool = False,
    drop_path: float = 0.0,
) -> TokenSwin:
    """A network of timm by name, without published weights.

    Args:
        name: such as swin_tiny_patch4_window7_224.
        img_size: in pixels, a multiple of 32.
        mask_token: as in `TokenSwin`.
        drop_path: share of residual branches that training drops in the last block, rising from 0 in the first.
    Raises: UserError for another name or size.
    """
    if not name.startswith("swin_") or name not in timm.list_models("swin_*"):
        raise UserError(f"timm has no Swin transformer named {name!r}; swin_base_patch4_window7_224 is one")
    if img_size < 32 or img_size % 32 or in_chans < 1 or not 0 <= drop_path < 1:
        raise UserError(
            f"swin: img_size={img_size} must be a multiple of 32, in_chans={in_chans} at least 1 and drop_path="
            f"{drop_path} lie in [0, 1)"
        )
    network = timm_network(name, num_classes=0, img_size=img_size, in_chans=in_chans, drop_path_rate=drop_path)
    return TokenSwin(network, mask_token)
