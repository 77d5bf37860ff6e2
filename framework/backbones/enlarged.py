"""Small pictures for a network of photographs. Shapes: B images, C channels, h w their sides, F features."""

from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.widths import given_features


class Enlarged(nn.Module):
    """Brings images to one size, and grey ones to three channels, before a network: [B C h w] -> [B F].

    Values stay what they are, so that data should be standardised as the network was trained, such as with a mean and a
    deviation of 0.5. Gradients reach the images.

    Args:
        network: [B 3 S S] -> [B F].
        size: S, at least 1.
    Raises: UserError for images that have neither one channel nor three.
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        require_in("[1, inf)", size=size)
        self.network, self.size, self.num_features = network, size, given_features(network)

    def forward(self, image_BChw: Tensor) -> Tensor:
        if image_BChw.shape[1] not in (1, 3):
            raise UserError(
                f"Enlarged takes images of one channel or three, and these have {image_BChw.shape[1]}; it is "
                "not for a network of other channels"
            )
        image_BCSS = F.interpolate(image_BChw, (self.size, self.size), mode="bilinear", align_corners=False)
        return self.network(image_BCSS.expand(-1, 3, -1, -1))
