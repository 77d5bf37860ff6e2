"""A map of attention before pooling, which shows where an embedding comes from.

Source: ADSL, arXiv 2206.09068, section 3, and the authors' code: A = sigmoid(conv(relu(conv(relu(conv x))))) of 3 x 3
convolutions C -> C/8 -> C/32 -> 1.
Shapes: B images, C channels of a feature map of h x w.
"""

from itertools import pairwise

from torch import Tensor, nn


class SpatialAttention(nn.Module):
    """A feature map's attention in (0, 1): [B C h w] -> [B 1 h w].

    Args:
        in_chans: C. Hidden layers have an eighth and a thirty-second of it, at least one channel.
    """

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        widths = [in_chans, max(in_chans // 8, 1), max(in_chans // 32, 1), 1]
        first, second, third = (nn.Conv2d(*pair, kernel_size=3, padding=1) for pair in pairwise(widths))
        self.layers = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.Sigmoid())

    def forward(self, x_BChw: Tensor) -> Tensor:
        return self.layers(x_BChw)
