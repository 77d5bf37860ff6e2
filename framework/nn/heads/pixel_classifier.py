"""A class for each pixel or voxel, from maps of a backbone.

Shapes: B samples, C channels, sides of as many axes as samples have, F width of the maps, K classes.
"""

from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.widths import given_features


class PixelClassifier(nn.Sequential):
    """A backbone and a linear map of each pixel's features: samples [B C sides...] -> logits [B K sides...].

    Args:
        backbone: samples -> maps [B F sides...], with `num_features` F, such as a `lightspan.backbones.dense.UNet`.
        num_classes: K.
    Raises: UserError for a backbone that does not say the width of its maps, and in `forward` for one whose maps have
        other sides than the samples.
    """

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        if (width := given_features(backbone)) is None:
            raise UserError(
                f"each pixel is classified by the maps of the backbone, and {type(backbone).__name__} has no "
                "num_features, their width; use one that has, such as lightspan.backbones.dense.UNet"
            )
        super().__init__(backbone, nn.Linear(width, num_classes))

    def forward(self, sample_BC: Tensor) -> Tensor:
        backbone, head = self
        maps_BF = backbone(sample_BC)
        if maps_BF.shape[2:] != sample_BC.shape[2:]:
            raise UserError(
                f"each pixel is classified, and of images {[*sample_BC.shape]} the backbone "
                f"{type(backbone).__name__} gives {[*maps_BF.shape]}; use one that gives maps of their size, such as "
                "lightspan.backbones.dense.UNet"
            )
        return head(maps_BF.movedim(1, -1)).movedim(-1, 1)
