"""An image and a text encoder with one space for both: what CLIP trains, and what prompts are learned for.

Source: Radford et al., 2021, arXiv 2103.00020, section 2.3 and figure 3: linear maps without bias into the common
space, rows of length 1, and a learned temperature. Shapes: B images or texts, C H W image, T tokens, D common width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightspan.backbones.weights import stored_linear
from lightspan.core.batches import inputs_in
from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.unit_length import unit_length

# A recipe may name the class and the function listed here.
__all__ = ["DualEncoder", "aligned_encoders"]


class DualEncoder(nn.Module):
    """Maps images and texts to rows of length 1 whose products, times `scale`, are logits.

    Args:
        image: [B C H W], or whatever its data are -> [B num_features].
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

    def encode_image(self, *x: Tensor) -> Tensor:
        """[B D], rows of length 1, of [B C H W] or of what else the image encoder is called with."""
        return unit_length(self.image_map(self.image(*x)))

    def features(self, batch: Any) -> Tensor:
        """Of the images of a batch, [B D]: what the feature store asks of an encoder."""
        return self.encode_image(*inputs_in(batch))

    def encode_text(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """[B D], rows of length 1."""
        return self.map_text(self.text(tokens_BT, mask_BT))

    def map_text(self, features_BF: Tensor) -> Tensor:
        """[B D], rows of length 1, of what the text encoder gave."""
        return unit_length(self.text_map(features_BF))


def aligned_encoders(image: nn.Module, text: nn.Module, path: ReadPath, temperature: float = 0.07) -> DualEncoder:
    """Two encoders that were never trained together, with the maps that `AlignPairs` of
    `lightspan.evaluation.alignment.pairs` learned from pairs of their features.

    Args:
        image: whose features were `first`.
        text: whose features were `second`.
        path: `result.safetensors` of that run.
        temperature: of the logits, > 0.
    Raises: UserError for a file that is none of these, or encoders of other widths.
    """
    maps = [stored_linear(path, prefix) for prefix in ("first.", "second.")]
    encoders = DualEncoder(image, text, maps[0].out_features, temperature)
    for name, own, stored in (("image", encoders.image_map, maps[0]), ("text", encoders.text_map, maps[1])):
        if own.weight.shape != stored.weight.shape or stored.bias is None:
            raise UserError(
                f"the {name} encoder gives {own.in_features} features, and the map of {path} takes "
                f"{stored.in_features} of them; take the encoders whose features were aligned"
            )
    encoders.image_map, encoders.text_map = maps
    return encoders
