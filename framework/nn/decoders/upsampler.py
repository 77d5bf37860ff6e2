"""Pictures at twice their size, again and again, by light convolutions.

Source: Noman et al., "SatMAE++", 2024, arXiv 2403.05419, section 3.2, and the authors' code.
Shapes: B pictures, C bands, H W sides, F features.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.ranges import require_in


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of each pixel, [B F H W]."""

    def forward(self, x_BFHW: Tensor) -> Tensor:
        return super().forward(x_BFHW.movedim(1, -1)).movedim(-1, 1)


class UpBlock(nn.Module):
    """Transposed convolution, norm and leaky ReLU, then a residual block of half strength and a norm:
    [B F H W] -> [B F 2H 2W]. A pixel becomes the four that it covers: nothing is shifted.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(features, features, 4, stride=2, padding=1)
        self.norm, self.out = ChannelNorm(features, eps=1e-6), ChannelNorm(features, eps=1e-6)
        self.first, self.second = (nn.Conv2d(features, features, 3, padding=1) for _ in range(2))

    def forward(self, x_BFHW: Tensor) -> Tensor:
        up = F.leaky_relu(self.norm(self.up(x_BFHW)))
        return self.out(up + 0.5 * self.second(F.relu(self.first(up))))


class UpsamplerPyramid(nn.Module):
    """Pictures [B C H W] -> those of 2, 4, ... times the size, one for each of its steps.

    As in the authors' code, convolutions of blocks and heads start Xavier-uniform with biases of zero, and the first
    one and transposed ones as torch's do.

    Args:
        channels: C.
        steps: how often the size doubles, at least 1.
        features: F; None is four times C.
    """

    def __init__(self, channels: int, steps: int = 2, features: int | None = None) -> None:
        super().__init__()
        features = 4 * channels if features is None else features
        require_in("[1, inf)", channels=channels, steps=steps, features=features)
        self.channels, self.steps = channels, steps
        self.enter, self.norm = nn.Conv2d(channels, features, 1), ChannelNorm(features, eps=1e-6)
        self.blocks = nn.ModuleList(UpBlock(features) for _ in range(steps))
        self.heads = nn.ModuleList(nn.Conv2d(features, channels, 3, padding=1) for _ in range(steps))
        for layer in (*self.blocks.modules(), *self.heads):
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # all of these have one

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        x_BFHW, pictures = self.norm(F.gelu(self.enter(x_BCHW))), []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x_BFHW = block(x_BFHW)
            pictures.append(head(x_BFHW))
        return pictures
