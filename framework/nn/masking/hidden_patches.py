"""The patches of images that a step hides: where they are, what they show, and pictures of the guesses.

A method that can show its guesses has `reconstruct(batch)` -> `Reconstruction | None` for an `ImageBatch`, or for the
two views of a `PairBatch`; None if its targets are no pixels. `lightspan.callbacks.pictures.reconstructions` draws it.
Shapes: B images, C h w, H W grid of T patches, K visible and M hidden ones, d numbers of a patch, its pixels times C.
Letters are those of images: h w and H W stand for as many axes as samples have, three for volumes and series of images.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lightspan.nn.image_numbers import image_numbers
from lightspan.nn.masking.mask_samplers import MaskSampler, seen_and_hidden
from lightspan.nn.sequences.patches import at_places, patchify, unpatchify
from lightspan.nn.sequences.token_backbone import TokenBackbone


class Reconstruction(NamedTuple):
    """Pictures, standardised as in the batch [B C h w]; which of their pixels were hidden, bool [B 1 h w], or
    [B C h w] where that differs by channel; the same pictures with guesses in the hidden places [B C h w]; and those
    that were looked at as a whole, if there are any.
    """

    image_BChw: Tensor
    hidden_B1hw: Tensor
    guess_BChw: Tensor
    other_BChw: Tensor | None = None


@dataclass(frozen=True)
class HiddenPatches:
    """Images, the sides of a patch, the grid, and int64 places of visible and of hidden patches, [B K] and [B M]."""

    image_BChw: Tensor
    patch: tuple[int, ...]
    grid: tuple[int, ...]
    see_BK: Tensor
    hide_BM: Tensor

    @classmethod
    def draw(cls, backbone: TokenBackbone, masks: MaskSampler, image_BChw: Tensor, index_B: Tensor, step: int) -> Self:
        """Those of a step. Raises: UserError for masks with different counts, or images that do not fit the backbone.

        Args:
            index_B: the images' numbers in their dataset.
        """
        grid, patch = backbone.grid(image_BChw), tuple(backbone.patch_shape[:-1])
        masks_BHW = masks.draw(grid, step, image_numbers(index_B))
        return cls(image_BChw, patch, grid, *seen_and_hidden(masks_BHW, image_BChw.device))

    def pixels(self) -> Tensor:
        """What the hidden patches show, [B M d]."""
        return at_places(patchify(self.image_BChw, self.patch), self.hide_BM)

    def reconstruction(self, guess_BMd: Tensor) -> Reconstruction:
        """Puts guesses of pixels into the hidden places; all other patches stay as they are."""
        patches_BTd = patchify(self.image_BChw, self.patch)
        at_BMd = self.hide_BM[..., None].expand(-1, -1, patches_BTd.shape[2])
        filled_BTd = patches_BTd.scatter(1, at_BMd, guess_BMd.to(patches_BTd.dtype))
        area = math.prod(self.patch)
        hidden_BTp = torch.zeros_like(patches_BTd[..., :area], dtype=torch.bool).scatter(1, at_BMd[..., :area], True)
        hidden_B1hw, guess_BChw = (unpatchify(part, self.patch, self.grid) for part in (hidden_BTp, filled_BTd))
        return Reconstruction(self.image_BChw, hidden_B1hw, guess_BChw)
