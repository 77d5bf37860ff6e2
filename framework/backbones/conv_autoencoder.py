"""A convolutional autoencoder whose layers can be compared one by one, with and without dropout as noise.

Source: Dizaji et al., "Deep Clustering via Joint Convolutional Autoencoder Embedding and Relative Entropy Minimization"
(DEPICT), ICCV 2017, arXiv 1704.06327, and the authors' code: two convolutions, a dense layer with tanh, and their
mirror. Shapes: B images, C H W image, E embedding width.
"""

import math
from itertools import pairwise

from torch import Tensor, nn

from lightspan.core.errors import UserError

SLOPE = 0.01  # of LeakyReLU


class ConvAutoencoder(nn.Module):
    """[B C H W] -> [B E] in [-1, 1], without dropout in either mode: what is clustered. Weights start Xavier-uniform.

    Args:
        in_shape: C, H, W of the images.
        channels: of each convolution.
        kernels: side of each convolution's kernel.
        stride: of all convolutions, without padding.
        embed_dim: E; the number of clusters in DEPICT.
        input_dropout, dropout: shares of pixels and of entries after each layer but the last that the noisy encoder
            sets to zero, in [0, 1).
        bounded: the decoder ends in tanh, for images in [-1, 1]; False ends it linearly, for standardised ones.
    Raises: UserError for images that a convolution leaves nothing of.
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int] = (1, 28, 28),
        channels: tuple[int, ...] = (50, 50),
        kernels: tuple[int, ...] = (4, 5),
        stride: int = 2,
        embed_dim: int = 10,
        input_dropout: float = 0.1,
        dropout: float = 0.1,
        bounded: bool = True,
    ) -> None:
        super().__init__()
        if not channels or len(channels) != len(kernels) or min(*channels, *kernels, *in_shape, stride, embed_dim) < 1:
            raise UserError(
                f"ConvAutoencoder: channels={tuple(channels)} and kernels={tuple(kernels)} must be equally many, and "
                f"like stride={stride}, embed_dim={embed_dim} and in_shape={tuple(in_shape)} at least 1"
            )
        if not (0 <= input_dropout < 1 and 0 <= dropout < 1):
            raise UserError(f"ConvAutoencoder input_dropout={input_dropout} and dropout={dropout} must lie in [0, 1)")
        sides = [tuple(in_shape[1:])]
        for kernel in kernels:
            sides.append(tuple((side - kernel) // stride + 1 for side in sides[-1]))
        if min(map(min, sides)) < 1:
            raise UserError(
                f"ConvAutoencoder: kernels={tuple(kernels)} with stride={stride} make {sides[1:]} pixels of images of "
                f"{tuple(in_shape)}; use smaller kernels or fewer layers"
            )
        widths, inner = [in_shape[0], *channels], (channels[-1], *sides[-1])
        convolutions = [
            nn.Sequential(nn.Conv2d(*pair, kernel, stride), nn.LeakyReLU(SLOPE))
            for pair, kernel in zip(pairwise(widths), kernels, strict=True)
        ]
        dense = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(inner), embed_dim), nn.Tanh())
        undense = nn.Sequential(nn.Linear(embed_dim, math.prod(inner)), nn.LeakyReLU(SLOPE), nn.Unflatten(1, inner))
        mirrors = []
        for layer, kernel in reversed([*enumerate(kernels)]):
            # What the stride left over at the far edges comes back there.
            high, wide = ((side - kernel) % stride for side in sides[layer])
            up = nn.ConvTranspose2d(widths[layer + 1], widths[layer], kernel, stride, output_padding=(high, wide))
            last = (nn.Tanh() if bounded else nn.Identity()) if layer == 0 else nn.LeakyReLU(SLOPE)
            mirrors.append(nn.Sequential(up, last))
        self.encoder, self.decoder = nn.ModuleList([*convolutions, dense]), nn.ModuleList([undense, *mirrors])
        # Nothing is dropped before the dense layer: the last convolution keeps its entries.
        shares = [input_dropout, *[dropout] * (len(channels) - 1), 0.0]
        self.noise = nn.ModuleList(nn.Dropout(share) for share in shares)
        self.in_shape, self.num_features = tuple(in_shape), embed_dim
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)  # type: ignore[arg-type]

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The encoder's layers, see `lightspan.nn.tokens`."""
        return [*self.encoder]

    def encode(self, image_BCHW: Tensor, noisy: bool = False) -> list[Tensor]:
        """The outputs of all layers, from the first to the embedding [B E]; `noisy` drops entries while training.

        Raises: UserError for images of another shape than `in_shape`.
        """
        if (given := tuple(image_BCHW.shape[1:])) != self.in_shape:
            raise UserError(
                f"ConvAutoencoder was made for images of in_shape={self.in_shape} (channels, height, width), and these "
                f"are {given}; set in_shape to that"
            )
        outputs, x = [], image_BCHW
        for layer, noise in zip(self.encoder, self.noise, strict=True):
            x = layer(noise(x) if noisy else x)
            outputs.append(x)
        return outputs

    def decode(self, z_BE: Tensor) -> list[Tensor]:
        """Reconstructions of the image and of the outputs of all layers but the embedding, in the encoder's order."""
        outputs, x = [], z_BE
        for layer in self.decoder:
            x = layer(x)
            outputs.append(x)
        return outputs[::-1]

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.encode(image_BCHW)[-1]
