"""An image and a text encoder with one space for both: what CLIP trains, and what prompts are learned for.

Source: Radford et al., 2021, arXiv 2103.00020, section 2.3 and figure 3: linear maps without bias into the common
space, rows of length 1, and a learned temperature. Shapes: B images or texts, C H W image, T tokens, D common width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.unit_length import unit_length

# A recipe may name the class listed here.
__all__ = ["DualEncoder"]


class DualEncoder(nn.Module):
    """Maps images and texts to rows of length 1 whose products, times `scale`, are logits.

    Args:
        image: [B C H W] -> [B num_features].
        text: tokens and mask [B T] -> [B num_features]; prompts also need its `tokens` and `read`, as in
            `lightspan.backbones.text.TextTransformer`.
        width: D.
        temperature: to start with, > 0.
        image_bias: whether the map of images has a bias, as that of CLIP's ResNets has.

    Attributes:
        log_scale: [1], the logarithm of 1 / temperature; not a scalar, which FSDP2 would refuse.
    """

    def __init__(
        self,
        image: nn.Module,
        text: nn.Module,
        width: int = 512,
        temperature: float = 0.07,
        image_bias: bool = False,
    ) -> None:
        super().__init__()
        features: list[Any] = [getattr(encoder, "num_features", None) for encoder in (image, text)]
        if not all(isinstance(count, int) for count in features):
            raise UserError(
                f"DualEncoder needs the widths of both encoders, but {type(image).__name__} or {type(text).__name__} "
                "has no num_features"
            )
        if width < 1 or not 0 < temperature < math.inf:
            raise UserError(f"DualEncoder width={width} must be at least 1, and temperature={temperature} above 0")
        self.image, self.text = image, text
        self.image_map = nn.Linear(features[0], width, bias=image_bias)
        self.text_map = nn.Linear(features[1], width, bias=False)
        for layer in (self.image_map, self.text_map):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))

    @property
    def scale(self) -> Tensor:
        """1 / temperature, 0-d, in float32 or wider."""
        return wide(self.log_scale).exp().squeeze(0)

    def encode_image(self, x_BCHW: Tensor) -> Tensor:
        """[B D], rows of length 1."""
        return unit_length(self.image_map(self.image(x_BCHW)))

    def features(self, batch: Any) -> Tensor:
        """Of the images of a batch, [B D]: what the feature store asks of an encoder."""
        return self.encode_image(batch["image"])

    def encode_text(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """[B D], rows of length 1."""
        return self.map_text(self.text(tokens_BT, mask_BT))

    def map_text(self, features_BF: Tensor) -> Tensor:
        """[B D], rows of length 1, of what the text encoder gave."""
        return unit_length(self.text_map(features_BF))
