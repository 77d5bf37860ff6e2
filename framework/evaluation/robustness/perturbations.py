"""One perturbation for all images, and where it is laid: what an audit of one's own encoder trains.

Source: Zhou et al., "Downstream-agnostic Adversarial Examples", ICCV 2023, arXiv 2307.12280 (their generator and
patch); Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, arXiv 1610.08401 (one perturbation
for all). Images here are in [0, 1], and so is what a perturbation makes of them, which the published code leaves out.
Shapes: B images [C H W], Z rows of noise.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.ranges import require_in, require_numbers

Shape = tuple[int, ...]
"""C H W"""
NOISE = 100
"""Numbers of noise a row, of which the paper's generator makes an image."""


def high_frequencies(x_BCHW: Tensor, radius: float) -> Tensor:
    """Images without the frequencies nearer to zero than `radius`, in cycles an image: 0 keeps all of them, and more
    than half of the diagonal none.
    """
    rows, columns = (torch.fft.fftfreq(n, 1 / n, device=x_BCHW.device) for n in x_BCHW.shape[-2:])
    kept_HW = (rows[:, None].square() + columns.square()).sqrt() >= radius
    return torch.fft.ifft2(torch.fft.fft2(x_BCHW) * kept_HW).real


class Placement(ABC):
    """Where a perturbation lies, and the least and greatest number in it."""

    low: float
    high: float

    @abstractmethod
    def apply(self, x_BCHW: Tensor, delta_CHW: Tensor) -> Tensor:
        """Perturbed images in [0, 1]."""

    def bounded(self, delta_CHW: Tensor) -> Tensor:
        return delta_CHW.clamp(self.low, self.high)


class Everywhere(Placement):
    """Added to every pixel.

    Args:
        epsilon: the largest change of a pixel, in (0, 1]; the paper's 10 / 255.
    """

    def __init__(self, epsilon: float = 10 / 255) -> None:
        require_in("(0, 1]", epsilon=epsilon)
        self.low, self.high = -epsilon, epsilon

    def apply(self, x_BCHW: Tensor, delta_CHW: Tensor) -> Tensor:
        return (x_BCHW + delta_CHW).clamp(0, 1)


class Patch(Placement):
    """In place of a square near the lower right corner; every other pixel stays as it is.

    Args:
        share: of the image's pixels, in (0, 1]; the paper's 3 %. The square has at least one pixel, and lies as far
            from both edges as half of its side, as far as there is room.
    """

    low, high = 0.0, 1.0

    def __init__(self, share: float = 0.03) -> None:
        require_in("(0, 1]", share=share)
        self.share = share

    def mask(self, height: int, width: int) -> Tensor:
        """bool [H W]"""
        side = min(height, width, max(1, round(math.sqrt(self.share * height * width))))
        top, left = (max(0, length - side - side // 2) for length in (height, width))
        covered_HW = torch.zeros(height, width, dtype=torch.bool)
        covered_HW[top : top + side, left : left + side] = True
        return covered_HW

    def apply(self, x_BCHW: Tensor, delta_CHW: Tensor) -> Tensor:
        return torch.where(self.mask(*x_BCHW.shape[-2:]).to(x_BCHW.device), delta_CHW, x_BCHW)


class Perturbation(ABC):
    """How a perturbation is parameterised, and the Adam that trains it."""

    betas: tuple[float, float] = (0.9, 0.999)

    @abstractmethod
    def begin(self, shape: Shape, placement: Placement) -> nn.Module:
        """A module without inputs that gives an image, from torch's global generator; the placement bounds it."""

    @abstractmethod
    def step(self, placement: Placement) -> float:
        """Adam's rate."""

    def project(self, module: nn.Module, placement: Placement) -> None:  # noqa: B027 - optional
        """What follows a step."""


class _Pixels(nn.Module):
    def __init__(self, start_CHW: Tensor) -> None:
        super().__init__()
        self.delta_CHW = nn.Parameter(start_CHW)

    def forward(self) -> Tensor:
        return self.delta_CHW


class Direct(Perturbation):
    """Every number of the perturbation is trained, and put back between its bounds after each step.

    Args:
        rate: of Adam, as a share of half the distance between the bounds, above 0.
    """

    def __init__(self, rate: float = 0.1) -> None:
        require_in("(0, inf)", rate=rate)
        self.rate = rate

    def begin(self, shape: Shape, placement: Placement) -> nn.Module:
        return _Pixels(placement.low + (placement.high - placement.low) * torch.rand(shape))

    def step(self, placement: Placement) -> float:
        return self.rate * (placement.high - placement.low) / 2

    @torch.no_grad()
    def project(self, module: nn.Module, placement: Placement) -> None:
        for delta_CHW in module.parameters():
            delta_CHW.clamp_(placement.low, placement.high)


class _Generator(nn.Module):
    def __init__(self, shape: Shape, rows: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.size = shape[1:]
        self.register_buffer("noise", torch.randn(rows, NOISE, 1, 1))
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(zip((NOISE, *widths), (*widths, shape[0]), strict=True)):
            stride, padding = (2, 1) if number else (1, 0)
            layers.append(nn.ConvTranspose2d(before, after, 4, stride, padding, bias=number == len(widths)))
            layers += [nn.BatchNorm2d(after), nn.ReLU()] if number < len(widths) else [nn.Tanh()]
        self.images = nn.Sequential(*layers)
        self.mixed = nn.Conv2d(rows, 1, 3, padding=1)

    def forward(self) -> Tensor:
        images_ZCHW = self.images(self.noise)
        delta_C1HW = self.mixed(images_ZCHW.transpose(0, 1))  # the rows of noise are the channels of the convolution
        return F.interpolate(delta_C1HW, self.size, mode="bilinear", align_corners=False)[:, 0]


class Generated(Perturbation):
    """The paper's: a DCGAN makes images of fixed noise, and one convolution mixes all of them into one.

    It makes squares of 4 pixels, doubled as often as there are `widths`; other sizes are interpolated. Its output is
    cut at the bounds, where it has no gradient.

    Args:
        rows: of noise, at least 2; the paper's 256.
        widths: of the layers; the paper's are 1024, 512, 256, 128, for 64 pixels.
        rate: of Adam, above 0.
    """

    betas = (0.5, 0.999)

    def __init__(self, rows: int = 256, widths: tuple[int, ...] = (1024, 512, 256, 128), rate: float = 2e-4) -> None:
        require_in("[2, inf)", rows=rows)
        require_in("[1, inf)", widths=widths, layers=len(widths))
        require_in("(0, inf)", rate=rate)
        require_numbers(rows * widths[-1] * 4 ** (1 + len(widths)), rows=rows, widths=widths)
        self.rows, self.widths, self.rate = rows, tuple(widths), rate

    def begin(self, shape: Shape, placement: Placement) -> nn.Module:
        return _Generator(shape, self.rows, self.widths)

    def step(self, placement: Placement) -> float:
        return self.rate


def random_signs(shape: Shape, placement: Placement, generator: torch.Generator) -> Tensor:
    """The floor: a perturbation of which every number is one of the bounds."""
    upper_CHW = torch.rand(shape, generator=generator) < 0.5
    return torch.where(upper_CHW, placement.high, placement.low)
