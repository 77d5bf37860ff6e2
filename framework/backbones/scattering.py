"""ScatSimCLR's network: wavelets that are not trained, and a small residual network behind them.

Source: Kinakh, Taran, Voloshynovskyy, "ScatSimCLR: Self-supervised contrastive learning with pretext task
regularization for small-scale datasets", ICCV workshops 2021, arXiv 2108.13939, section 3, and the authors' code; the
scattering transform is that of Bruna and Mallat (2013, arXiv 1203.1514), as kymatio computes it.
Shapes: B images, C H W image, S maps of a channel, h w = H / 2^J, W / 2^J.
"""

import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError, install_extra


class Scattering(nn.Module):
    """[B C H W] -> [B C S h w] with S = 1 + L J + L^2 J (J - 1) / 2: averages of an image, of the moduli of its wavelet
    coefficients, and of the moduli of theirs. Nothing in it is trained, and it is non-expansive.

    Computed in float32 or wider, also under autocast.

    Args:
        img_size: H and W, each at least 2^scales; a number stands for both.
        scales: J, at least 1.
        angles: L, at least 1.
    Raises: UserError for sizes out of range, and without the package kymatio.
    """

    def __init__(self, img_size: int | tuple[int, int], scales: int = 2, angles: int = 16) -> None:
        super().__init__()
        img_size = (img_size, img_size) if isinstance(img_size, int) else img_size
        if scales < 1 or angles < 1 or min(img_size) < 2**scales:
            raise UserError(
                f"Scattering: scales={scales} and angles={angles} must be at least 1, and both sides of "
                f"img_size={list(img_size)} at least 2^scales = {2 ** max(scales, 0)}"
            )
        try:  # not kymatio.torch, whose 3-D transform asks SciPy for what its new versions lack
            from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D
        except ImportError as error:
            raise UserError(f"Scattering needs the package kymatio: {install_extra('scattering')}") from error
        self.img_size, self.scales = tuple(img_size), scales
        self.maps = 1 + angles * scales + angles**2 * scales * (scales - 1) // 2
        self.transform = ScatteringTorch2D(J=scales, shape=self.img_size, L=angles)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if tuple(x_BCHW.shape[2:]) != self.img_size:
            raise UserError(
                f"images of {list(x_BCHW.shape[2:])} pixels, and the wavelets are made for "
                f"img_size={list(self.img_size)}; set it to the size of the views"
            )
        with torch.autocast(x_BCHW.device.type, enabled=False):
            return self.transform(wide(x_BCHW).contiguous())


class ScatteringNet(nn.Module):
    """Scattering, 3x3 convolution - BatchNorm - ReLU, residual blocks without strides, and an average over each cell of
    a grid: [B C H W] -> [B num_features], which is the last width times grid^2.

    The paper's ScatSimCLR8, 12, 16 and 30 have stem 32 and stages [[64, 4], [128, 4]], and stem 256 and
    [[128, 4], [64, 4], [128, 4]], [[128, 6], [64, 4], [128, 6]] and [[128, 30]].

    Args:
        img_size: H and W, as in `Scattering`.
        in_chans: C.
        scales, angles: J and L of the scattering.
        stem: channels of the first convolution.
        stages: (channels, blocks) of each stage of residual blocks, at least one.
        grid: cells on each side, at least 1.
        normalise: a BatchNorm without weights on the maps. Those of second order are small beside the first; the
            authors' code makes such a norm and does not use it.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        in_chans: int = 3,
        scales: int = 2,
        angles: int = 16,
        stem: int = 256,
        stages: tuple[tuple[int, int], ...] = ((128, 6), (64, 4), (128, 6)),
        grid: int = 4,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        if not stages or min(in_chans, stem, grid, *(number for stage in stages for number in stage)) < 1:
            raise UserError(
                f"ScatteringNet: in_chans={in_chans}, stem={stem}, grid={grid} and all numbers of "
                f"stages={[list(stage) for stage in stages]} must be at least 1, and there must be a stage"
            )
        self.scattering = Scattering(img_size, scales, angles)
        maps = in_chans * self.scattering.maps
        self.norm = nn.BatchNorm2d(maps, affine=False) if normalise else nn.Identity()
        self.stem = nn.Sequential(nn.Conv2d(maps, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        blocks, width = [], stem
        for out, count in stages:
            for _ in range(count):
                blocks.append(BasicBlock(width, out, downsample=_widen(width, out)))
                width = out
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.num_features = width * grid**2

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The stem and each block, see `lightspan.nn.tokens`."""
        return [self.stem, *self.blocks]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        maps = self.norm(self.scattering(x_BCHW).flatten(1, 2))
        return self.pool(self.blocks(self.stem(maps))).flatten(1)


def _widen(width: int, out: int) -> nn.Module | None:
    """The way around a block that changes the width."""
    return None if width == out else nn.Sequential(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out))
