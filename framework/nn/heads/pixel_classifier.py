"""A class for each pixel or voxel, from maps of a backbone.

Shapes: B images or volumes, C channels, H W their sides, of any number, F width of the maps, K classes.
"""

from torch import Tensor, nn

from lightspan.core.errors import UserError


class PixelClassifier(nn.Sequential):
    """A backbone and a convolution of single pixels: images [B C H W] -> logits [B K H W].

    Raises: UserError for a backbone that gives no maps of the images' size.
    """

    def forward(self, image_BCHW: Tensor) -> Tensor:
        backbone, head = self
        maps_BFHW = backbone(image_BCHW)
        if maps_BFHW.shape[2:] != image_BCHW.shape[2:]:
            raise UserError(
                f"each pixel is classified, and of images {[*image_BCHW.shape]} the backbone "
                f"{type(backbone).__name__} gives {[*maps_BFHW.shape]}; use one that gives maps of their size, such as "
                "lightspan.backbones.dense.UNet"
            )
        return head(maps_BFHW)
