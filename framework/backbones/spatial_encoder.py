"""A convolutional network that tells where things are: the encoder of inverse dynamics pretraining.

Source: Brandfonbrener et al., "Inverse Dynamics Pretraining Learns Good Representations for Multitask Imitation",
NeurIPS 2023, arXiv 2305.16985, and the authors' code.
Shapes: B images, C H W image, M maps of h w pixels, D width.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.heads.spatial_softmax import spatial_softmax
from lightspan.nn.init import he_normal_

KERNEL = 3
LEAST_SIDE = 2
"""Of the last maps: along one pixel there is one place."""


class SpatialEncoder(nn.Module):
    """[B C H W] -> [B D] in (-1, 1): convolutions of 3 x 3 pixels without padding, each followed by GELU, one of 1 x 1,
    the place of each of its maps by `spatial_softmax` without a temperature, a linear layer, LayerNorm and tanh.

    Weights start He-normal, biases at 0: under smaller ones maps are nearly constant, and all places in the middle.

    Args:
        in_chans: C.
        channels, strides: of the convolutions in their order, equally many; strides of 1 for small images.
        maps: M, whose places are 2 M numbers.
        width: D; the paper's code is of 64 numbers.
    Raises: UserError for sizes that do not fit; in the forward pass for images of which less than 2 pixels of a side
        are left.
    """

    def __init__(
        self,
        in_chans: int = 3,
        channels: Sequence[int] = (32, 64, 128, 256),
        strides: Sequence[int] = (2, 2, 1, 1),
        maps: int = 256,
        width: int = 64,
    ) -> None:
        super().__init__()
        sizes = [in_chans, maps, width, *channels, *strides]
        if not channels or len(channels) != len(strides) or min(sizes) < 1:
            raise UserError(
                f"SpatialEncoder: channels={[*channels]} and strides={[*strides]} must be equally many, at least one, "
                f"and like in_chans={in_chans}, maps={maps} and width={width} at least 1"
            )
        self.in_chans, self.strides, self.num_features = in_chans, tuple(strides), width
        taken = [in_chans, *channels[:-1]]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(wide_in, wide_out, KERNEL, stride), nn.GELU())
                for wide_in, wide_out, stride in zip(taken, channels, strides, strict=True)
            )
        )
        self.maps = nn.Conv2d(channels[-1], maps, kernel_size=1)
        self.code = nn.Sequential(nn.Linear(2 * maps, width), nn.LayerNorm(width), nn.Tanh())
        he_normal_(self)

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The convolutions, see `lightspan.nn.tokens`."""
        return [*self.stages]

    def forward(self, image_BCHW: Tensor) -> Tensor:
        self._require(image_BCHW)
        places_BM2 = spatial_softmax(self.maps(self.stages(image_BCHW)))
        return self.code(places_BM2.flatten(1))

    def _require(self, image_BCHW: Tensor) -> None:
        given = [*image_BCHW.shape[1:]]
        if len(given) != 3 or given[0] != self.in_chans:
            raise UserError(
                f"SpatialEncoder takes images [{self.in_chans}, height, width], and these are {given}; set in_chans"
            )
        sides = given[1:]
        for stride in self.strides:
            sides = [(side - KERNEL) // stride + 1 for side in sides]
        if min(sides) < LEAST_SIDE:
            raise UserError(
                f"SpatialEncoder strides={[*self.strides]} leave {max(sides[0], 0)} x {max(sides[1], 0)} pixels of "
                f"images of {given[1]} x {given[2]}, and places need 2 of each side; lower the strides, or give fewer "
                "channels"
            )
