"""Views: random variants of a picture, for methods that learn from agreement between them.

The numbers of a view are drawn first, by one sampler, and the picture is made from them: in the workers or, for whole
batches, on the device (`lightspan.datamodules.image.augment`). They are drawn from torch's global CPU generator, which
`seeded` sets, so a view is a function of its seed wherever it is made.
Shapes: C H W image, V views, P parameters.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightspan.core.augmentation import Augmentation
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.image.augment.rendering import WHOLE, Drawn, Rendering, pixel_box

VIEWS = "[1, 4096]"
"""How many a sample may have, far more than methods compare."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with torch's global CPU generator at `seed`, and restore it. Other devices are not touched."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


class Views(Augmentation):
    """Maps one image to its views: float32 or uint8 [C, H, W] -> list of float32 [C, H, W], all in [0, 1].

    All randomness comes from torch's global CPU generator. Views of your own need no more than `__call__`; those that
    derive from `DrawnViews` can also be made on the device, and tell methods how they came about.
    """

    @property
    def drawn(self) -> "DrawnViews | None":
        """These views as ones whose numbers are drawn first; None where drawing and making are one."""
        return None


class DrawnViews(Views):
    """Views that are pictures of drawn numbers (`ViewParameters`).

    A subclass whose `__call__` or `render` is its own makes pictures that its `renderings` do not know of: it counts as
    views made one image at a time, which are not made on the device.
    """

    @property
    def drawn(self) -> "DrawnViews | None":
        kind = type(self)
        as_described = kind.__call__ is DrawnViews.__call__ and kind.render is DrawnViews.render
        return self if as_described else None

    @property
    @abstractmethod
    def renderings(self) -> list[Rendering]:
        """How each of the V views is made from its numbers."""

    @abstractmethod
    def draw(self, shape: tuple[int, ...]) -> list[Drawn]:
        """The numbers of V views of an image of this shape [C, H, W]. All that is random happens here."""

    def render(self, image: Tensor, drawn: list[Drawn]) -> list[Tensor]:
        return [rendering.one(image, numbers) for rendering, numbers in zip(self.renderings, drawn, strict=True)]

    def __call__(self, image: Tensor) -> list[Tensor]:
        return self.render(image, self.draw(tuple(image.shape)))


class Plain(DrawnViews):
    """The image itself, `count` times: the control for every method that works with views."""

    def __init__(self, count: int = 2) -> None:
        require_in(VIEWS, count=count)
        self.count = count

    @property
    def renderings(self) -> list[Rendering]:
        return [Rendering()] * self.count

    def draw(self, shape: tuple[int, ...]) -> list[Drawn]:
        return [Drawn(WHOLE)] * self.count


class MultiCrop(Views):
    """The views of several others, one after the other (Caron et al., "SwAV", 2020, arXiv 2006.09882, section 3.3).

    Large crops of most of the image come first by convention, then smaller crops of less of it: methods that tell
    global from local views go by the order. Two parts of one view each are a pair from two distributions, as BYOL has
    it: the first always blurred, say, and the second solarised.

    Args:
        parts: for instance a `RandomViews` of two views of 224 pixels and one of eight views of 96.
    """

    def __init__(self, parts: list[Views]) -> None:
        if not parts:
            raise UserError("MultiCrop parts is an empty list; give at least one kind of views")
        self.parts = parts

    def __call__(self, image: Tensor) -> list[Tensor]:
        return [view for part in self.parts for view in part(image)]

    @property
    def drawn(self) -> DrawnViews | None:
        parts = [part.drawn for part in self.parts if part.drawn is not None]
        return _Joined(parts) if len(parts) == len(self.parts) else None


class _Joined(DrawnViews):
    """A `MultiCrop` of drawn views."""

    def __init__(self, parts: list[DrawnViews]) -> None:
        self.parts = parts

    @property
    def renderings(self) -> list[Rendering]:
        return [rendering for part in self.parts for rendering in part.renderings]

    def draw(self, shape: tuple[int, ...]) -> list[Drawn]:
        return [numbers for part in self.parts for numbers in part.draw(shape)]


class Repeated(DrawnViews):
    """The same views several times, drawn once: a control for methods whose views should differ.

    Args:
        views: what is repeated as a whole, such as a `RandomViews` with count=1.
        times: in [1, 4096], as are the views that come of it.
    """

    def __init__(self, views: DrawnViews, times: int = 2) -> None:
        require_in(VIEWS, times=times)
        _require_drawn("Repeated", views)
        require_in(VIEWS, **{f"{times=} times views": times * len(views.renderings)})
        self.views, self.times = views, times

    @property
    def renderings(self) -> list[Rendering]:
        return self.views.renderings * self.times

    def draw(self, shape: tuple[int, ...]) -> list[Drawn]:
        return self.views.draw(shape) * self.times


class RandomViews(DrawnViews):
    """Independent views: crop, turn, mirror, colour jitter, grey, blur, solarise, grain, in this order.

    The defaults suit small grey pictures of things without a reading direction (28 x 28 clothes). For digits and
    letters set flip=0. For colour photographs set saturation, hue, grey and blur as well.

    Args:
        count: views of an image, in [1, 4096].
        size: sides of a view in pixels; None keeps the image's own height and width.
        scale: share of the image's area that a crop keeps, least and most, each in (0, 1].
        ratio: width over height of a crop, least and most, > 0; uniform in the logarithm. Without a `size` it is
            relative to the image's own. A crop that does not fit into the image becomes the largest that does.
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
        require_in(VIEWS, count=count)
        require_in("[1, inf)", size=size)
        require_numbers(count * 3 * (size or 1) ** 2, count=count, size=size)
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

    @property
    def renderings(self) -> list[Rendering]:
        colour = WHOLE
        if self.jitter:
            colour = WHOLE._replace(
                brightness=1 + self.brightness, contrast=1 + self.contrast, saturation=1 + self.saturation, hue=self.hue
            )
        widest = colour._replace(
            top=0.0 if self.scale == self.ratio == (1, 1) else 1.0,
            angle=self.degrees,
            mirrored=float(self.flip > 0),
            grey=float(self.grey > 0),
            blur=self.blur_sigma[1] * (self.blur > 0),
            solarised=float(self.solarise > 0),
            grain=self.grain,
        )
        return [Rendering(self.size, widest)] * self.count

    def draw(self, shape: tuple[int, ...]) -> list[Drawn]:
        return self.draw_within(shape, (0, 0, *shape[1:]))

    def draw_within(self, shape: tuple[int, ...], outer: tuple[int, ...]) -> list[Drawn]:
        """As `draw`, with crops of a box (top, left, height, width in pixels) in place of the image.

        `scale`, and without a `size` also `ratio`, are relative to the box.
        """
        return [self._drawn(shape, outer) for _ in range(self.count)]

    def _drawn(self, shape: tuple[int, ...], outer: tuple[int, ...]) -> Drawn:
        # All numbers are drawn at once, used or not, so that one setting does not shift the draws of the others.
        area, shape_of_crop, y, x, angle, mirrored, jittered, bright, contrast, colour, hue, greyed, blurred, sigma = (
            torch.rand(14).tolist()
        )
        # These draw beside the numbers above, so that views without them are what they were before there were any.
        solarised = float(torch.rand(())) < self.solarise if self.solarise else False
        channels, height, width = shape
        view_sides = [self.size] * 2 if self.size else [height, width]
        noise = torch.randn(channels, *view_sides) if self.grain else None

        first_row, first_column, rows, columns = outer
        # A view is square, so a crop's own shape is what stretches it, as in torchvision's RandomResizedCrop.
        to_relative = rows / columns if self.size else 1.0
        ratio, least, most = (r * to_relative for r in (_log_between(shape_of_crop, *self.ratio), *self.ratio))
        top, left, high, wide = _crop_box(rows, columns, _between(area, *self.scale), ratio, least, most, y, x)
        p = WHOLE._replace(
            top=(first_row + top) / height,
            left=(first_column + left) / width,
            height=high / height,
            width=wide / width,
            angle=_between(angle, -self.degrees, self.degrees),
            mirrored=float(mirrored < self.flip),
            blur=_between(sigma, *self.blur_sigma) if blurred < self.blur else 0.0,
            solarised=float(solarised),
            grain=self.grain,
        )
        if jittered < self.jitter:
            p = p._replace(brightness=_factor(bright, self.brightness), contrast=_factor(contrast, self.contrast))
        if channels == 3:
            p = p._replace(grey=float(greyed < self.grey))
            if jittered < self.jitter:
                p = p._replace(saturation=_factor(colour, self.saturation), hue=_between(hue, -self.hue, self.hue))
        return Drawn(p, noise)


class NestedCrops(DrawnViews):
    """A view, and further views whose crops lie inside its crop (Eymael et al., "CropMAE", 2024, arXiv 2403.17823).

    All are cut out of the image itself, so an inner view shows more detail than the outer one has. Each is mirrored,
    turned and coloured by itself.

    Args:
        outer: with count=1.
        inner: its `scale`, and without a `size` also its `ratio`, are relative to the outer crop.
    """

    def __init__(self, outer: RandomViews, inner: RandomViews) -> None:
        if outer.count != 1:
            raise UserError(f"NestedCrops outer.count={outer.count}; inner crops lie in one outer view, so set it to 1")
        for part in (outer, inner):
            _require_drawn("NestedCrops", part)
        self.outer, self.inner = outer, inner

    @property
    def renderings(self) -> list[Rendering]:
        return self.outer.renderings + self.inner.renderings

    def draw(self, shape: tuple[int, ...]) -> list[Drawn]:
        (drawn,) = self.outer.draw(shape)
        return [drawn, *self.inner.draw_within(shape, pixel_box(drawn.parameters, *shape[1:]))]


class TwoViews(RandomViews):
    """Two `RandomViews` of the image's own size; `settings` are the others of that class."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(count=2, size=None, **settings)


def _require_drawn(kind: str, part: DrawnViews) -> None:
    if part.drawn is None:
        raise UserError(
            f"{kind} makes views from drawn numbers, but {type(part).__name__} has a __call__ or render of its own, "
            "which would be left out; give it RandomViews, or write both in one class"
        )


def numbers_of_views(views: Views | None, side: int) -> int:
    """Numbers of a colour picture of `side` x `side` pixels and its views, as far as is known: of those that are drawn
    first.
    """
    drawn = None if views is None else views.drawn
    sides = [] if drawn is None else [rendering.size or side for rendering in drawn.renderings]
    return sum(3 * each**2 for each in (side, *sides))


def view_as_image(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with its one view as its image, without `parameters`; as it is where it has no views."""
    if "views" not in sample:
        return sample
    rest = {name: field for name, field in sample.items() if name not in ("views", "parameters")}
    (rest["image"],) = sample["views"]
    return rest


def _between(draw: float, least: float, most: float) -> float:
    return least + draw * (most - least)


def _log_between(draw: float, least: float, most: float) -> float:
    return math.exp(_between(draw, math.log(least), math.log(most)))


def _factor(draw: float, strength: float) -> float:
    return _between(draw, 1 - strength, 1 + strength)


def _crop_box(
    height: int, width: int, area: float, ratio: float, least: float, most: float, y: float, x: float
) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels of a crop with this share of the area and this relative width over height.

    A side that would exceed the image's is limited to it, and the other so that the ratio stays in [least, most].
    `y` and `x` in [0, 1) place the crop.
    """
    high, wide = min(1.0, math.sqrt(area / ratio)), min(1.0, math.sqrt(area * ratio))
    high, wide = min(high, wide / least), min(wide, high * most)
    h, w = max(1, round(height * high)), max(1, round(width * wide))
    return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w


def _check_range(kind: str, name: str, bounds: tuple[float, float], most: float) -> None:
    if not 0 < bounds[0] <= bounds[1] <= most:
        limit = "" if most == math.inf else f" <= {most:g}"
        raise UserError(f"{kind} {name}={list(bounds)} must be two numbers with 0 < least <= most{limit}")
