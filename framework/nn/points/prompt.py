"""Clouds as coloured pictures for networks that know pictures: what such a network is asked with, a prompt.

Source: Wang et al., "P2P: Tuning Pre-trained Image Models for Point Cloud Analysis with Point-to-Pixel Prompting",
2022, arXiv 2208.02812, sections 3.2 and 3.3, and its code.
Shapes: N points of all clouds, B clouds, C channels, S side of a picture.
"""

import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.points.edges import EdgeEncoder
from lightspan.nn.points.projection import projected, seen_along

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PointPrompt(nn.Module):
    """Packed points and a view of each cloud -> pictures [B 3 S S].

    The features that `encoder` gives points, as the data have them, are summed in the pixels that they have in their
    cloud's view, so that colours tell where in the object something is, from wherever it is seen. A residual block and
    two 1x1 convolutions make colours of the sums, which a sigmoid brings into [0, 1], and which are standardised as the
    pictures were on which the network was trained. Pixels without points are coloured alike.

    Args:
        encoder: of points; None has the paper's 64 features of 32 neighbours.
        side: S, above `spread`.
        spread: side of the block of pixels that a point has, odd.
        mean, std: of red, green and blue, for the network behind.
    Raises: UserError for sizes that do not fit.
    """

    def __init__(
        self,
        encoder: EdgeEncoder | None = None,
        side: int = 224,
        spread: int = 3,
        mean: tuple[float, float, float] = IMAGENET[0],
        std: tuple[float, float, float] = IMAGENET[1],
    ) -> None:
        super().__init__()
        if spread < 1 or spread % 2 == 0 or side <= spread:
            raise UserError(f"spread={spread} must be odd and above 0, and side={side} above it")
        require_in("(0, inf)", std=std)
        require_in("(-inf, inf)", mean=mean)
        self.encoder, self.side, self.spread, self.mean, self.std = encoder or EdgeEncoder(), side, spread, mean, std
        width = self.encoder.out_features
        self.colour = nn.Sequential(BasicBlock(width, width), nn.Conv2d(width, width, 1), nn.Conv2d(width, 3, 1))

    def pictures(self, x_NC: Tensor, xyz_N3: Tensor, offsets: Tensor, axes_B33: Tensor) -> Tensor:
        """[B 3 S S], from features that points have already.

        Args:
            axes_B33: to the right, down and away, of each cloud, see `lightspan.nn.points.projection.seen_along`.
        """
        seen = projected(seen_along(xyz_N3.detach(), offsets, axes_B33), offsets, self.side, self.spread)
        colour_B3SS = self.colour(seen.scattered(x_NC)).sigmoid()
        mean_311, std_311 = (torch.tensor(x, device=xyz_N3.device).view(3, 1, 1) for x in (self.mean, self.std))
        return (colour_B3SS - mean_311.to(colour_B3SS)) / std_311.to(colour_B3SS)

    def forward(self, xyz_N3: Tensor, offsets: Tensor, axes_B33: Tensor) -> Tensor:
        return self.pictures(self.encoder(xyz_N3, offsets), xyz_N3, offsets, axes_B33)
