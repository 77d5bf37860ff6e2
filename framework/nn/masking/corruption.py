"""Corrupted images: groups of neighbouring patches give way to noise, to nothing, or to content from elsewhere.

Source: Atito, Awais, Kittler, "SiT", 2021, arXiv 2104.03602, and "GMML", 2022, arXiv 2205.14986: group masked model
learning. Masks and noise are functions of seed, step, image and view; noise is made on the images' device.
Shapes: B images, C channels, h w their sides, H W grid of patches, or of pixels; of both as many axes as images have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.noise import hashed_noise, mixed_seed
from lightspan.nn.image_numbers import image_numbers
from lightspan.nn.masking.block_masks import BlockMasks
from lightspan.nn.masking.mask_samplers import MaskSampler
from lightspan.nn.sequences.patches import cells_to_pixels


@dataclass(frozen=True)
class GroupCorruption:
    """Replaces blocks of patches of each image.

    Args:
        masks: which patches; by default up to 0.7 of each image.
        alien: share of the images whose blocks show the image before them in the batch of this rank, in [0, 1]. At 0 an
            image's corruption does not depend on its batch, and N ranks draw what one would.
        fill: what the blocks of all others show: Gaussian noise of variance 1, as standardised images have; zeros, the
            mean colour; or the image itself at another place, one shift for all blocks, around its borders.
        alien_masks: which patches of the first kind; None takes `masks` there too.
    """

    masks: MaskSampler = field(default_factory=lambda: BlockMasks(probability=1.0, ratio=(0.3, 0.7)))
    alien: float = 0.5
    fill: Literal["noise", "zeros", "shifted"] = "noise"
    alien_masks: MaskSampler | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alien <= 1:
            raise UserError(f"GroupCorruption alien={self.alien} is a share of images and must lie in [0, 1]")
        if self.fill not in ("noise", "zeros", "shifted"):
            raise UserError(f"GroupCorruption fill={self.fill!r} must be noise, zeros or shifted")

    def __call__(
        self, image_BChw: Tensor, grid: tuple[int, ...], index_B: Tensor, step: int, view: int = 0
    ) -> tuple[Tensor, np.ndarray]:
        """(corrupted images, masks bool [B H W]). The only image of a batch shows itself where it is to show another.

        Args:
            grid: of what is masked as a whole; the images' own sides for masks of pixels.
            index_B: the images' numbers in their dataset.
        """
        device, numbers = image_BChw.device, image_numbers(index_B)
        masks_BHW = self.masks.draw(grid, step, numbers, view)
        drawn_B = np.array([each.random() for each in self._generators(step, numbers, view, 2)])
        alien_B = drawn_B.reshape(-1, *[1] * len(grid)) < self.alien
        if self.alien_masks is not None:
            of_aliens = self.alien_masks.draw(grid, step, numbers, view)
            masks_BHW = np.where(alien_B, of_aliens, masks_BHW)
        fill_BChw = torch.where(
            torch.from_numpy(alien_B).to(device)[:, None],
            image_BChw.roll(1, dims=0),
            self._own(image_BChw, index_B, step, view),
        )
        sides = [side // count for side, count in zip(image_BChw.shape[2:], grid, strict=True)]
        hidden_Bhw = cells_to_pixels(torch.from_numpy(masks_BHW).to(device), sides)
        return torch.where(hidden_Bhw[:, None], fill_BChw, image_BChw), masks_BHW

    def _own(self, image_BChw: Tensor, index_B: Tensor, step: int, view: int) -> Tensor:
        """What blocks show where it is not another image, everywhere: [B C h w]."""
        if self.fill == "zeros":
            return torch.zeros_like(image_BChw)
        if self.fill == "noise":
            seed_B = mixed_seed(index_B.to(image_BChw.device), step, self.masks.seed)
            return hashed_noise(seed_B, view, tuple(image_BChw.shape[1:])).to(image_BChw)
        sides = tuple(image_BChw.shape[2:])
        generators = self._generators(step, image_numbers(index_B), view, 3)
        drawn = np.array([each.integers(sides) for each in generators], dtype=np.int64).reshape(-1, len(sides))
        for axis, (side, shift_B) in enumerate(
            zip(sides, torch.from_numpy(drawn).to(image_BChw.device).T, strict=True)
        ):
            place_Bs = (torch.arange(side, device=shift_B.device) + shift_B[:, None]) % side
            place_Bs = place_Bs.unflatten(1, (*[1] * (1 + axis), side, *[1] * (len(sides) - 1 - axis)))
            image_BChw = image_BChw.gather(2 + axis, place_Bs.expand_as(image_BChw))
        return image_BChw

    def _generators(self, step: int, indices: Sequence[int], view: int, stream: int) -> Iterator[np.random.Generator]:
        return (np.random.default_rng((self.masks.seed, step, index, view, stream)) for index in indices)
