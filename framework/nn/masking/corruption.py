"""Corrupted images: groups of neighbouring patches give way to noise or to another image's content.

Source: Atito, Awais, Kittler, "SiT", 2021, arXiv 2104.03602, and "GMML", 2022, arXiv 2205.14986: group masked model
learning. Masks and noise are functions of seed, step, image and view; noise is made on the images' device.
Shapes: B images, C channels, h w their sides, H W grid of patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lightspan.errors import UserError
from lightspan.nn.image_numbers import image_numbers
from lightspan.nn.masking.block_masks import BlockMasks
from lightspan.noise import hashed_noise, mixed_seed


@dataclass(frozen=True)
class GroupCorruption:
    """Replaces blocks of patches of each image.

    Args:
        masks: which patches; by default up to 0.7 of each image.
        alien: share of the images whose blocks show the image before them in the batch of this rank, in [0, 1]; those
            of all others are Gaussian noise of variance 1, as standardised images have. At 0 an image's corruption does
            not depend on its batch, and N ranks draw what one would.
    """

    masks: BlockMasks = field(default_factory=lambda: BlockMasks(probability=1.0, ratio=(0.3, 0.7)))
    alien: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alien <= 1:
            raise UserError(f"GroupCorruption alien={self.alien} is a share of images and must lie in [0, 1]")

    def __call__(
        self, image_BChw: Tensor, grid: tuple[int, int], index_B: Tensor, step: int, view: int = 0
    ) -> tuple[Tensor, np.ndarray]:
        """(corrupted images, masks bool [B H W]). The only image of a batch shows itself where it is to show another.

        Args:
            index_B: the images' numbers in their dataset.
        """
        device, numbers = image_BChw.device, image_numbers(index_B)
        masks_BHW = self.masks.draw(grid, step, numbers, view)
        seed_B = mixed_seed(index_B.to(device), step, self.masks.seed)
        noise_BChw = hashed_noise(seed_B, view, tuple(image_BChw.shape[1:]))
        alien_B = self._coins(step, numbers, view) < self.alien
        fill_BChw = torch.where(
            torch.from_numpy(alien_B).to(device)[:, None, None, None],
            image_BChw.roll(1, dims=0),
            noise_BChw.to(image_BChw),
        )
        sides = [side // count for side, count in zip(image_BChw.shape[2:], grid, strict=True)]
        hidden_Bhw = np.kron(masks_BHW, np.ones((1, *sides), dtype=bool))
        return torch.where(torch.from_numpy(hidden_Bhw).to(device)[:, None], fill_BChw, image_BChw), masks_BHW

    def _coins(self, step: int, indices: Sequence[int], view: int) -> np.ndarray:
        drawn = [np.random.default_rng((self.masks.seed, step, index, view, 2)).random() for index in indices]
        return np.array(drawn, dtype=np.float64)
