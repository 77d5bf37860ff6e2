"""Makes a view from the numbers that were drawn for it: of one image on the CPU, or of a batch on its device.

Both take the same `ViewParameters` and make the same picture, up to the rounding of their sums.
Shapes: B rows, C channels, H W image and h w view in pixels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lightspan.core.noise import hashed_noise
from lightspan.datamodules.image.augment import steps
from lightspan.datamodules.image.batch import ViewParameters

WHOLE = ViewParameters(0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""The image as it is."""


NO_LABEL = -1
"""Of a pixel that has none, or shows nothing of the image."""


class Drawn(NamedTuple):
    """The numbers of one view, and its grain, float32 [C, h, w] of deviation 1; None without grain."""

    parameters: ViewParameters[float]
    noise: Tensor | None = None


def unit_float(image: Tensor) -> Tensor:
    """Bytes as shares of white. Divided and not multiplied, which would round differently."""
    if image.dtype != torch.uint8:
        return image
    # Pillow's images have their channels last, which resizing would take up to twice as long for.
    return image.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


@dataclass(frozen=True)
class Rendering:
    """The steps of a view: crop, turn, mirror, brightness, contrast, saturation, hue, grey, blur, solarise, grain.

    Colour steps leave images alone that do not have three channels.

    Args:
        size: sides of the view in pixels; None keeps the image's own.
        widest: each parameter as far from `WHOLE` as it may be. What cannot differ is left out of a batch, where each
            step is done for all rows: to skip some, the host would have to wait for the device.
    """

    size: int | None = None
    widest: ViewParameters[float] = WHOLE

    def one(self, image: Tensor, drawn: Drawn) -> Tensor:
        """The view [C, h, w] of an image, float or uint8 [C, H, W]; of frames [T, C, H, W] the same view of each."""
        p, sides = drawn.parameters, image.shape[-2:]
        height, width = [self.size] * 2 if self.size else sides
        # Cropped before bytes become floats, of which there are then fewer, with the same result.
        view = F.resize_image(unit_float(F.crop_image(image, *pixel_box(p, *sides))), [height, width], antialias=True)
        if p.angle:
            view = F.rotate_image(view, p.angle, F.InterpolationMode.BILINEAR)
        if p.mirrored:
            view = F.horizontal_flip_image(view)
        return _coloured(view[None], p, p, drawn.noise)[0] if view.ndim == 3 else _coloured(view, p, p, drawn.noise)

    def labels(self, label_HW: Tensor, drawn: Drawn) -> Tensor:
        """The labels [h w] of what `one` shows of an image with these of its pixels, each that of the nearest pixel;
        `NO_LABEL` where it shows nothing of the image.
        """
        p, sides = drawn.parameters, label_HW.shape
        label_hw = nearest(label_HW, pixel_box(p, *sides), *([self.size] * 2 if self.size else sides))
        if p.angle:
            label_hw = F.rotate_mask(label_hw[None], p.angle, fill=NO_LABEL)[0]
        return label_hw.flip(1) if p.mirrored else label_hw

    def many(self, image_BCHW: Tensor, p: ViewParameters[Tensor], seed_B: Tensor, stream: int) -> Tensor:
        """The views [B, C, h, w] of images in [0, 1], on their device. No row depends on another.

        Args:
            p: float32 [B] each.
            seed_B: int64, of the grain, which is another than that of `one`.
            stream: tells the grain of several views of an image apart.
        """
        widest, view = self.widest, image_BCHW
        H, W = view.shape[2:]
        if self.size or widest[:4] != WHOLE[:4]:
            box_B4 = torch.stack([p.top * H, p.left * W, p.height * H, p.width * W], dim=1).round()
            view = steps.resampled(view, box_B4, self.size or H, self.size or W)
        if widest.angle:
            view = steps.turned(view, p.angle)
        rows = ViewParameters(*(x_B[:, None, None, None] for x_B in p))
        if widest.mirrored:
            view = torch.where(rows.mirrored > 0, view.flip(3), view)
        noise = hashed_noise(seed_B, stream, view.shape[1:]) if widest.grain else None
        return _coloured(view, rows, widest, noise)


def _coloured(
    view: Tensor, p: ViewParameters[float] | ViewParameters[Tensor], widest: ViewParameters[float], noise: Tensor | None
) -> Tensor:
    """The steps that move no pixel. Those are done in which `widest` differs from `WHOLE`."""
    in_colour = view.shape[1] == 3
    if widest.brightness != 1:
        view = (view * p.brightness).clamp_(0, 1)
    if widest.contrast != 1:
        view = steps.blended(view, steps.grey_of(view).mean(dim=(1, 2, 3), keepdim=True), p.contrast)
    if widest.saturation != 1 and in_colour:
        view = steps.blended(view, steps.grey_of(view), p.saturation)
    if widest.hue and in_colour:
        view = steps.hue_turned(view, p.hue)
    if widest.grey and in_colour:
        view = steps.blended(view, steps.grey_of(view), 1 - p.grey)
    if widest.blur:
        view = steps.blurred(view, p.blur, widest.blur)
    if widest.solarised:
        view = steps.blended(torch.minimum(view, 1 - view), view, p.solarised)  # what is above half is inverted
    if noise is not None:
        view = view + p.grain * noise
    return view.clamp(0, 1)  # turning and blurring round a little past the ends


def nearest(label_HW: Tensor, box: tuple[int, int, int, int], height: int, width: int) -> Tensor:
    """The labels nearest to the pixels of a crop (top, left, height, width) at `height` x `width`: int64,
    `NO_LABEL` outside the image.
    """
    top, left, high, wide = box
    row_h1 = top + ((torch.arange(height)[:, None] + 0.5) * (high / height)).long()
    column_w = left + ((torch.arange(width) + 0.5) * (wide / width)).long()
    rows, columns = label_HW.shape
    inside_hw = (row_h1 >= 0) & (row_h1 < rows) & (column_w >= 0) & (column_w < columns)
    label_hw = label_HW[row_h1.clamp(0, rows - 1), column_w.clamp(0, columns - 1)].long()
    return label_hw.masked_fill_(~inside_hw, NO_LABEL)


def pixel_box(p: ViewParameters[float], height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the crop in pixels."""
    return round(p.top * height), round(p.left * width), round(p.height * height), round(p.width * width)
