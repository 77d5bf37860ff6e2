"""Views: random variants of a picture, for methods that learn from agreement between them.

A view draws only from torch's global CPU generator; `seeded` seeds that for it, so a view is a function of its
seed.
Shapes: C H W image.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lightspan.errors import UserError


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with torch's global CPU generator at `seed`, and restore it. Other devices are not touched."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


class Views(ABC):
    """Maps one image to its views: float32 or uint8 [C, H, W] -> list of float32 [C, H, W], all in [0, 1].

    All randomness comes from torch's global CPU generator.
    """

    @abstractmethod
    def __call__(self, image: Tensor) -> list[Tensor]: ...


class Plain(Views):
    """The image itself, `count` times: the control for every method that works with views."""

    def __init__(self, count: int = 2) -> None:
        if count < 1:
            raise UserError(f"count={count} views is too few; it must be at least 1")
        self.count = count

    def __call__(self, image: Tensor) -> list[Tensor]:
        return [_unit_float(image)] * self.count


class MultiCrop(Views):
    """The views of several others, one after the other (Caron et al., "SwAV", 2020, arXiv 2006.09882, section 3.3).

    Large crops of most of the image come first by convention, then smaller crops of less of it: methods that tell
    global from local views go by the order.

    Args:
        parts: for instance a `RandomViews` of two views of 224 pixels and one of eight views of 96.
    """

    def __init__(self, parts: list[Views]) -> None:
        if not parts:
            raise UserError("MultiCrop parts is an empty list; give at least one kind of views")
        self.parts = parts

    def __call__(self, image: Tensor) -> list[Tensor]:
        return [view for part in self.parts for view in part(image)]


class RandomViews(Views):
    """Independent views: crop, turn, mirror, colour jitter, grey, blur, solarise, grain, in this order.

    The defaults suit small grey pictures of things without a reading direction (28 x 28 clothes). For digits and
    letters set flip=0. For colour photographs set saturation, hue, grey and blur as well.

    Args:
        count: views of an image, at least 1.
        size: sides of a view in pixels; None keeps the image's own height and width.
        scale: share of the image's area that a crop keeps, least and most, each in (0, 1].
        ratio: width over height of a crop relative to the image's own, least and most, > 0; uniform in the logarithm.
        degrees: rotate by an angle uniform in [-degrees, degrees]; corners become black.
        flip: probability of a left-right mirror.
        brightness, contrast, saturation: x in [0, 1], a factor uniform in [1 - x, 1 + x]; saturation affects only
            colour images.
        hue: shift uniform in [-hue, hue] turns of the colour circle, at most 0.5; affects only colour images.
        jitter: probability that brightness, contrast, saturation and hue change at all.
        grey: probability that a colour image loses its colour.
        blur: probability of a Gaussian blur.
        blur_sigma: its standard deviation in pixels, least and most, > 0.
        solarise: probability that what is brighter than half is inverted.
        grain: standard deviation of Gaussian noise on each pixel, >= 0, where white is 1.
    """

    def __init__(
        self,
        count: int = 2,
        size: int | None = None,
        scale: tuple[float, float] = (0.3, 1.0),
        ratio: tuple[float, float] = (0.75, 4 / 3),
        degrees: float = 0.0,
        flip: float = 0.5,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.0,
        hue: float = 0.0,
        jitter: float = 0.8,
        grey: float = 0.0,
        blur: float = 0.0,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        solarise: float = 0.0,
        grain: float = 0.0,
    ) -> None:
        kind = type(self).__name__
        if count < 1 or (size is not None and size < 1):
            raise UserError(f"{kind} count={count} views of size={size} pixels: each must be at least 1")
        _check_range(kind, "scale", scale, 1.0)
        _check_range(kind, "ratio", ratio, math.inf)
        _check_range(kind, "blur_sigma", blur_sigma, math.inf)
        for name, value, most in (
            ("degrees", degrees, 180.0),
            ("flip", flip, 1.0),
            ("brightness", brightness, 1.0),
            ("contrast", contrast, 1.0),
            ("saturation", saturation, 1.0),
            ("hue", hue, 0.5),
            ("jitter", jitter, 1.0),
            ("grey", grey, 1.0),
            ("blur", blur, 1.0),
            ("solarise", solarise, 1.0),
            ("grain", grain, math.inf),
        ):
            if not 0 <= value <= most:
                raise UserError(f"{kind} {name}={value} is outside [0, {most:g}]")
        self.count, self.size = count, size
        self.scale, self.ratio, self.degrees, self.flip = scale, ratio, degrees, flip
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue
        self.jitter, self.grey, self.blur, self.blur_sigma = jitter, grey, blur, blur_sigma
        self.solarise, self.grain = solarise, grain

    def __call__(self, image: Tensor) -> list[Tensor]:
        image = _unit_float(image)
        return [self._view(image) for _ in range(self.count)]

    def _view(self, image: Tensor) -> Tensor:
        # All numbers are drawn at once, used or not, so that one setting does not shift the draws of the others.
        area, shape, y, x, angle, mirrored, jittered, bright, contrast, colour, hue, greyed, blurred, sigma = (
            torch.rand(14).tolist()
        )
        _, height, width = image.shape
        box = _crop_box(height, width, _between(area, *self.scale), _log_between(shape, *self.ratio), y, x)
        if self.size is not None:
            height = width = self.size
        view = F.resized_crop_image(image, *box, [height, width], antialias=True)
        if self.degrees:
            view = F.rotate_image(view, _between(angle, -self.degrees, self.degrees), F.InterpolationMode.BILINEAR)
        if mirrored < self.flip:
            view = F.horizontal_flip_image(view)
        in_colour = image.shape[0] == 3
        if jittered < self.jitter:
            if self.brightness:
                view = F.adjust_brightness_image(view, _factor(bright, self.brightness))
            if self.contrast:
                view = F.adjust_contrast_image(view, _factor(contrast, self.contrast))
            if self.saturation and in_colour:
                view = F.adjust_saturation_image(view, _factor(colour, self.saturation))
            if self.hue and in_colour:
                view = F.adjust_hue_image(view, _between(hue, -self.hue, self.hue))
        if greyed < self.grey and in_colour:
            view = F.rgb_to_grayscale_image(view, num_output_channels=3)
        if blurred < self.blur:
            deviation = _between(sigma, *self.blur_sigma)
            # Two deviations each way, but no further than the mirrored border reaches.
            radius = min(math.ceil(2 * deviation), height - 1, width - 1)
            view = F.gaussian_blur_image(view, [2 * radius + 1] * 2, [deviation] * 2)
        # These draw beside the numbers above, so that views without them are what they were before there were any.
        if self.solarise and float(torch.rand(())) < self.solarise:
            view = F.solarize_image(view, 0.5)
        if self.grain:
            view = view + self.grain * torch.randn_like(view)
        return view.clamp(0, 1)  # turning and blurring round a little past the ends


class TwoViews(RandomViews):
    """Two `RandomViews` of the image's own size; `settings` are the others of that class."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(count=2, size=None, **settings)


def _unit_float(image: Tensor) -> Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image


def _between(draw: float, least: float, most: float) -> float:
    return least + draw * (most - least)


def _log_between(draw: float, least: float, most: float) -> float:
    return math.exp(_between(draw, math.log(least), math.log(most)))


def _factor(draw: float, strength: float) -> float:
    return _between(draw, 1 - strength, 1 + strength)


def _crop_box(height: int, width: int, area: float, ratio: float, y: float, x: float) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels of a crop with this share of the area and this relative width over height.

    A side that would exceed the image's is limited to it. `y` and `x` in [0, 1) place the crop.
    """
    h = min(height, max(1, round(height * math.sqrt(area / ratio))))
    w = min(width, max(1, round(width * math.sqrt(area * ratio))))
    return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w


def _check_range(kind: str, name: str, bounds: tuple[float, float], most: float) -> None:
    if not 0 < bounds[0] <= bounds[1] <= most:
        limit = "" if most == math.inf else f" <= {most:g}"
        raise UserError(f"{kind} {name}={list(bounds)} must be two numbers with 0 < least <= most{limit}")
