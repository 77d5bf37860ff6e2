"""The plain augmentation of small photographs: a shift by a few pixels, and a mirror.

As He et al. 2016 (arXiv 1512.03385, section 4.2) train on CIFAR-10: four pixels of black on each side, a random crop of
the image's own size, and its mirror image half of the time.
Shapes: C H W image.
"""

import torch

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.augment.rendering import WHOLE, Drawn, Rendering
from lightspan.datamodules.image.augment.views import DrawnViews


class Shifted(DrawnViews):
    """One view of the image's own size, for methods that train on labelled images.

    Args:
        pixels: the largest shift each way, >= 0; black moves in.
        flip: probability of a left-right mirror, in [0, 1].
    """

    def __init__(self, pixels: int = 4, flip: float = 0.5) -> None:
        if pixels < 0 or not 0 <= flip <= 1:
            raise UserError(f"Shifted pixels={pixels} must be at least 0, and flip={flip} in [0, 1]")
        require_numbers(3 * pixels**2, pixels=pixels)  # an image grows by as much black before it is cut out
        self.pixels, self.flip = pixels, flip

    @property
    def renderings(self) -> list[Rendering]:
        return [Rendering(widest=WHOLE._replace(top=1.0, mirrored=float(self.flip > 0)))]

    def draw(self, shape: tuple[int, ...]) -> list[Drawn]:
        down, across, mirrored = torch.rand(3).tolist()  # all at once, so that one setting does not shift the others
        top, left = (int(share * (2 * self.pixels + 1)) - self.pixels for share in (down, across))
        return [Drawn(WHOLE._replace(top=top / shape[1], left=left / shape[2], mirrored=float(mirrored < self.flip)))]
