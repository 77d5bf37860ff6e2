"""Networks of clips: convolutions over space, then over time.

Source: Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition", 2018, arXiv 1711.11248,
section 3.4: R(2+1)D, as torchvision has it, with the names of its weights. Difference: any width and depth.
Shapes: B clips, C channels, T frames, H W pixels, D features.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from lightspan.core.errors import UserError

# A recipe may name the class listed here.
__all__ = ["R2Plus1D"]

STEM = 45, 64  # channels between the stem's two convolutions, and of the first stage, where the width is 64


class SpaceThenTime(nn.Sequential):
    """A convolution of each frame, and one of each pixel over time, with a norm and a ReLU between them."""

    def __init__(self, channels: int, between: int, out: int, stride: int) -> None:
        super().__init__(
            nn.Conv3d(channels, between, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
            nn.BatchNorm3d(between),
            nn.ReLU(inplace=True),
            nn.Conv3d(between, out, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
        )


class SpaceTimeBlock(nn.Module):
    """Two factorised convolutions and a shortcut, with as many parameters as 3 x 3 x 3 convolutions would have."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        between = 27 * channels * out // (9 * channels + 3 * out)
        self.conv1 = nn.Sequential(
            SpaceThenTime(channels, between, out, stride), nn.BatchNorm3d(out), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(SpaceThenTime(out, between, out, 1), nn.BatchNorm3d(out))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv3d(channels, out, 1, stride, bias=False), nn.BatchNorm3d(out))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        kept = x_BCTHW if self.downsample is None else self.downsample(x_BCTHW)
        return self.relu(self.conv2(self.conv1(x_BCTHW)) + kept)


class R2Plus1D(nn.Module):
    """Clips [B C T H W] of any size -> [B D], the mean over space and time; D is 8 width with four stages.

    Each stage but the first halves space and time, and doubles the channels; before them the stem halves space.
    Convolutions start as torchvision's do (He et al., 2015, by the outputs).

    Args:
        width: channels of the first stage; 64 is torchvision's `r2plus1d_18`, of 31.3 million parameters.
        depths: blocks of each stage.
        in_chans: C.
    Raises: UserError for sizes below 1.
    """

    def __init__(self, width: int = 64, depths: Sequence[int] = (2, 2, 2, 2), in_chans: int = 3) -> None:
        super().__init__()
        if not depths or min(width, in_chans, *depths) < 1:
            raise UserError(f"R2Plus1D width={width}, depths={[*depths]} and in_chans={in_chans} must be at least 1")
        between = max(1, STEM[0] * width // STEM[1])
        self.stem = nn.Sequential(
            nn.Conv3d(in_chans, between, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
            nn.BatchNorm3d(between),
            nn.ReLU(inplace=True),
            nn.Conv3d(between, width, (3, 1, 1), 1, (1, 0, 0), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        )
        channels, names = width, list[str]()
        for stage, depth in enumerate(depths):
            blocks = list[nn.Module]()
            for block in range(depth):
                out = width << stage
                blocks.append(SpaceTimeBlock(channels, out, stride=2 if stage and not block else 1))
                channels = out
            names.append(f"layer{stage + 1}")
            self.add_module(names[-1], nn.Sequential(*blocks))
        self.stages, self.num_features = tuple(names), channels
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The stages, see `lightspan.nn.tokens`."""
        return [self.get_submodule(name) for name in self.stages]

    def forward(self, clip: Tensor) -> Tensor:
        x_BCTHW = self.stem(clip)
        for name in self.stages:
            x_BCTHW = self.get_submodule(name)(x_BCTHW)
        return x_BCTHW.mean(dim=(2, 3, 4))
