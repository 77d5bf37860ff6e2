"""The plain augmentation of small photographs: a shift by a few pixels, and a mirror.

As He et al. 2016 (arXiv 1512.03385, section 4.2) train on CIFAR-10: four pixels of black on each side, a random crop of
the image's own size, and its mirror image half of the time.
Shapes: C H W image.
"""

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lightspan.datamodules.images.views import Views
from lightspan.errors import UserError


class Shifted(Views):
    """One view of the image's own size, for methods that train on labelled images.

    Args:
        pixels: the largest shift each way, >= 0; black moves in.
        flip: probability of a left-right mirror, in [0, 1].
    """

    def __init__(self, pixels: int = 4, flip: float = 0.5) -> None:
        if pixels < 0 or not 0 <= flip <= 1:
            raise UserError(f"Shifted pixels={pixels} must be at least 0, and flip={flip} in [0, 1]")
        self.pixels, self.flip = pixels, flip

    def __call__(self, image: Tensor) -> list[Tensor]:
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        down, across, mirrored = torch.rand(3).tolist()  # all at once, so that one setting does not shift the others
        top, left = (int(share * (2 * self.pixels + 1)) for share in (down, across))
        view = F.crop_image(F.pad_image(image, [self.pixels]), top, left, *image.shape[1:])
        return [F.horizontal_flip_image(view) if mirrored < self.flip else view]
