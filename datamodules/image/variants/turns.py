"""An image turned by each quarter, for networks that learn which way is up."""

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import Views


class QuarterTurns(Views):
    """The views of the image turned by 0, 90, 180 and 270 degrees, in this order: an exact turn, and then whatever
    `views` changes.

    `lightspan.nn.pretext.QuarterTurn` guesses the turn. Images must be square, so that all views have one size,
    unless `views` sets it.

    Args:
        views: of each turned image, one.
    """

    def __init__(self, views: Views) -> None:
        self.views = views

    def __call__(self, image: Tensor) -> list[Tensor]:
        seen = [self.views(torch.rot90(image, turn, (1, 2))) for turn in range(4)]
        if any(len(views) != 1 for views in seen) or len({views[0].shape for views in seen}) > 1:
            raise UserError(
                f"QuarterTurns views must give one view of one size, and give {[len(views) for views in seen]} of "
                f"{[[*view.shape[1:]] for views in seen for view in views]}; set count=1, and a size for images that "
                "are not square"
            )
        return [views[0] for views in seen]
