"""The image tokenizer of DALL-E, whose codes BEiT and CAE predict.

Source: Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021, arXiv 2102.12092; its encoder as transformers has it,
in FLAVA. Nothing is fetched: the user says where its weights are.
Shapes: B images, H W grid of codes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from lightspan.backbones.weights import with_weights
from lightspan.core.distributed import register_replicated
from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath

# A recipe may name the class listed here.
__all__ = ["DalleCodes"]

STRIDE, SQUEEZE = 8, 0.1
"""Pixels of a code along each side, and how far its pixels keep from 0 and 1."""


class DalleCodes(nn.Module):
    """Codes of an image, one for each patch: standardised [B 3 h w] -> int64 [B H*W] in [0, 8192).

    Images are put back to [0, 1] and resized to 8 pixels a code.

    Args:
        weights: safetensors file with the tensors of `transformers.FlavaImageCodebook`, such as model.safetensors made
            from facebook/flava-image-codebook; None leaves it untrained, for plans and tests.
        patch: sides of a patch of the network that predicts the codes, in pixels; None leaves them to the method, which
            calls `set_patch_shape`.
        mean, std: with which the data module standardised the images.
    Raises: UserError as `lightspan.backbones.weights.with_weights`.
    """

    codes = 8192
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        weights: ReadPath | None,
        patch: int | None = None,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        network = FlavaImageCodebook(FlavaImageCodebookConfig())
        self.network = (network if weights is None else with_weights(network, weights, prefix="")).eval()
        self.patch = patch
        register_replicated(self, "mean", torch.tensor(mean)[:, None, None], persistent=False)
        register_replicated(self, "std", torch.tensor(std)[:, None, None], persistent=False)

    def set_patch_shape(self, patch_shape: tuple[int, int, int]) -> None:
        """Takes the side of a backbone's patches if it was left open. Raises: UserError for others than were given."""
        height, width, channels = patch_shape
        if not (height == width == (self.patch or height) and channels == 3):
            raise UserError(
                f"DalleCodes are made for square patches of {self.patch or 'any'} pixels in 3 channels, and those of "
                f"the backbone have height, width and channels {[*patch_shape]}; leave patch out"
            )
        self.patch = height

    @torch.no_grad()
    def forward(self, image_BChw: Tensor) -> Tensor:
        if self.patch is None:
            raise UserError("DalleCodes do not know the size of a patch; set patch")
        sides = [STRIDE * (side // self.patch) for side in image_BChw.shape[2:]]
        image_BChw = (image_BChw * self.std + self.mean).clamp(0, 1)
        small = F.interpolate(image_BChw, sides, mode="bicubic", antialias=True).clamp(0, 1)
        return self.network.get_codebook_indices((1 - 2 * SQUEEZE) * small + SQUEEZE).flatten(1)  # type: ignore[operator]
