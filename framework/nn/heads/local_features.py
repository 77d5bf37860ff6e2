"""Dense features for matching, on a finer grid than a transformer's patches.

Source: Lu et al., "SelaVPR", ICLR 2024, arXiv 2402.14505, section 3.3.
Shapes: B pictures, D width, H W grid, P positions of the finer grid, E features.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.ranges import require_in
from lightspan.core.unit_length import unit_length


class UpConvolutions(nn.Module):
    """Maps [B D H W] -> unit vectors [B P E], row by row, by transposed convolutions with ReLU between them.

    Each has a kernel of 3, stride 2 and padding 1, and makes 2 n - 1 places of n: of 16 places two make 61.

    Args:
        in_features: D.
        widths: of what each gives, the last E, at least one.
    """

    def __init__(self, in_features: int, widths: Sequence[int] = (256, 128)) -> None:
        super().__init__()
        require_in("[1, inf)", in_features=in_features, widths=widths, number_of_widths=len(widths))
        self.in_features, self.out_features = in_features, widths[-1]
        layers: list[nn.Module] = []
        for taken, given in zip([in_features, *widths], widths, strict=False):
            layers += [nn.ConvTranspose2d(taken, given, 3, stride=2, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x_BDHW: Tensor) -> Tensor:
        return unit_length(wide(self.layers(x_BDHW)).flatten(2).mT)
