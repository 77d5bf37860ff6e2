"""A class for each pixel of a series, from the tokens of its dates.

Source: the fine-tuning code of Prithvi (Jakubik et al., 2023, arXiv 2310.18660): the dates' tokens side by side in the
channels, two stages of transposed convolutions that double the size twice each, and a convolutional head.
Shapes: B series, T dates of the grid, H W its rows and columns, D width of the tokens, K classes.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.decoders.upsampler import ChannelNorm


class SeriesNeck(nn.Module):
    """Tokens [B T*H*W D], without prefix, to logits [B K h w].

    Assumed, where the source has a batch norm: a layer norm over channels in the head, so that rows do not see one
    another.

    Args:
        in_features: D.
        dates: T; tokens of other numbers of dates do not fit.
        classes: K.
        width: channels of the stages; None is D.
        doublings: how often the size doubles, 4 in the source for patches of 16 pixels; the rest is bilinear.
    """

    def __init__(
        self, in_features: int, dates: int, classes: int, width: int | None = None, doublings: int = 4
    ) -> None:
        super().__init__()
        width = in_features if width is None else width
        require_in("[1, inf)", in_features=in_features, dates=dates, classes=classes, width=width)
        require_in("[0, inf)", doublings=doublings)
        self.in_features, self.dates, layers = in_features, dates, list[nn.Module]()
        for number in range(doublings):
            given = in_features * dates if number == 0 else width
            layers.append(nn.ConvTranspose2d(given, width, 2, stride=2))
            layers += [ChannelNorm(width, eps=1e-6), nn.GELU()] if number % 2 == 0 else []
        given = width if doublings else in_features * dates
        head = [
            nn.Conv2d(given, width, 3, padding=1),
            ChannelNorm(width, eps=1e-6),
            nn.ReLU(),
            nn.Conv2d(width, classes, 1),
        ]
        self.layers = nn.Sequential(*layers, *head)

    def forward(self, tokens_BND: Tensor, grid: Sequence[int], sides: Sequence[int]) -> Tensor:
        """Logits [B K sides...]. Raises: UserError for another number of dates."""
        if grid[0] != self.dates or tokens_BND.shape[2] != self.in_features:
            raise UserError(
                f"SeriesNeck is for {self.dates} dates of {self.in_features} features, and these are {grid[0]} of "
                f"{tokens_BND.shape[2]}; make it for them"
            )
        maps_BTHWD = tokens_BND.unflatten(1, tuple(grid))
        logits = self.layers(maps_BTHWD.permute(0, 1, 4, 2, 3).flatten(1, 2))
        return F.interpolate(logits, tuple(sides), mode="bilinear") if logits.shape[2:] != (*sides,) else logits
