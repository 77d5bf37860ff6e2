"""Small networks that draw an image from a vector of normal numbers.

Shapes: B images, L numbers of a latent, C channels, S side in pixels.
"""

from itertools import pairwise

from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in


class ConvGenerator(nn.Module):
    """[B L] -> [B C S S]: a linear layer makes the smallest map, and every further width doubles its sides and
    convolves it. The last layer is linear, for standardised images. Rows do not see one another.

    Args:
        latent_features: L, at least 1.
        in_chans: C, at least 1.
        image_size: S, a multiple of 2^(len(widths) - 1).
        widths: channels of each map from the smallest on, at least 1 each.
    Raises: UserError for settings out of range.
    """

    def __init__(
        self,
        latent_features: int = 32,
        in_chans: int = 1,
        image_size: int = 28,
        widths: tuple[int, ...] = (64, 32, 16),
    ) -> None:
        super().__init__()
        require_in("[1, inf)", latent_features=latent_features, in_chans=in_chans, image_size=image_size, widths=widths)
        require_in("[1, inf)", **{"len(widths)": len(widths)})
        smallest, left = divmod(image_size, 2 ** (len(widths) - 1))
        if left:
            raise UserError(
                f"ConvGenerator image_size={image_size} must be a multiple of {2 ** (len(widths) - 1)}, as each of "
                f"{len(widths)} widths but the first doubles the sides"
            )
        self.latent_features = latent_features
        start, first = (smallest, smallest), widths[0] * smallest**2
        layers: list[nn.Module] = [nn.Linear(latent_features, first), nn.ReLU(), nn.Unflatten(1, (widths[0], *start))]
        for narrow, wider in pairwise(widths):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(narrow, wider, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], in_chans, 3, padding=1))

    def forward(self, z_BL: Tensor) -> Tensor:
        return self.layers(z_BL)
