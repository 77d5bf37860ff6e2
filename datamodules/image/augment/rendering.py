"""Makes a view from the numbers that were drawn for it: of one image on the CPU, or of a batch on its device.

Both take the same `ViewParameters` and make the same picture, up to the rounding of their sums. The steps below that no
library has for a batch whose rows differ, or has only slowly, take float images [B C h w] in [0, 1], and numbers that
are the same for all rows or tensors [B 1 1 1] (those of `resampled` and `turned`: [B]). None reads a number back from
the device, and in none a row depends on another.

Shapes: B rows, C channels, H W image and h w view in pixels, K blur weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lightspan.core.noise import hashed_noise
from lightspan.datamodules.image.batch import ViewParameters

WHOLE = ViewParameters(0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""The image as it is."""
LUMA = (0.2989, 0.587, 0.114)  # of red, green, blue, as torchvision and Pillow have them
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
            view = resampled(view, box_B4, self.size or H, self.size or W)
        if widest.angle:
            view = turned(view, p.angle)
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
        view = blended(view, grey_of(view).mean(dim=(1, 2, 3), keepdim=True), p.contrast)
    if widest.saturation != 1 and in_colour:
        view = blended(view, grey_of(view), p.saturation)
    if widest.hue and in_colour:
        view = hue_turned(view, p.hue)
    if widest.grey and in_colour:
        view = blended(view, grey_of(view), 1 - p.grey)
    if widest.blur:
        view = blurred(view, p.blur, widest.blur)
    if widest.solarised:
        view = blended(torch.minimum(view, 1 - view), view, p.solarised)  # what is above half is inverted
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


def resampled(image_BCHW: Tensor, box_B4: Tensor, height: int, width: int) -> Tensor:
    """Each image's crop (top, left, height, width in pixels) at `height` x `width`, black outside the image.

    Bilinear with antialiasing, as torchvision's `resize` of that crop. That is linear and separable, with other weights
    in each row, so it is two batched products of matrices.
    """
    top_B, left_B, high_B, wide_B = box_B4.unbind(1)
    down_BhH = _resize_weights(top_B, high_B, image_BCHW.shape[2], height)
    across_BwW = _resize_weights(left_B, wide_B, image_BCHW.shape[3], width)
    narrow_BCHw = (image_BCHW.flatten(1, 2) @ across_BwW.mT).unflatten(1, image_BCHW.shape[1:3])
    return down_BhH[:, None] @ narrow_BCHw


def _resize_weights(start_B: Tensor, length_B: Tensor, size: int, target: int) -> Tensor:
    """What each of `size` pixels adds to each of `target` ones: [B target size]. A row sums to 1 but for black."""
    step_B11 = (length_B / target)[:, None, None]
    reach_B11 = step_B11.clamp_min(1.0)  # of the triangle on each side: it widens where the crop shrinks
    place_t1 = torch.arange(target, device=start_B.device)[:, None] + 0.5
    pixel_s = torch.arange(size, device=start_B.device) + 0.5
    start_B11, end_B11 = start_B[:, None, None], (start_B + length_B)[:, None, None]
    inside_B1s = (pixel_s > start_B11) & (pixel_s < end_B11)
    weights_Bts = (1 - (pixel_s - start_B11 - place_t1 * step_B11).abs() / reach_B11).clamp_min(0) * inside_B1s
    # A crop beyond the image is not resized (shifts): there a sum is 1, or 0 where all is black.
    return weights_Bts / weights_Bts.sum(dim=2, keepdim=True).clamp_min(1e-6)


def turned(image_BChw: Tensor, degrees_B: Tensor) -> Tensor:
    """Turned counter-clockwise about the middle, bilinear; black moves into the corners."""
    height, width = image_BChw.shape[2:]
    angle_B = torch.deg2rad(degrees_B)
    cos_B, sin_B, zero_B = angle_B.cos(), angle_B.sin(), torch.zeros_like(angle_B)
    rows = (cos_B, -sin_B * height / width, zero_B), (sin_B * width / height, cos_B, zero_B)
    theta_B23 = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid_Bhw2 = nnf.affine_grid(theta_B23, list(image_BChw.shape), align_corners=False)
    return nnf.grid_sample(image_BChw, grid_Bhw2, align_corners=False)


def grey_of(image_BChw: Tensor) -> Tensor:
    """Brightness [B 1 h w] of a colour image; another image as it is."""
    if image_BChw.shape[1] != 3:
        return image_BChw
    red, green, blue = image_BChw.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def blended(image_BChw: Tensor, other: Tensor, factor: float | Tensor) -> Tensor:
    """factor x image + (1 - factor) x other, in [0, 1]."""
    scaled, rest = image_BChw * factor, 1 - factor
    # The first is torchvision's sum to the last bit.
    return (scaled.addcmul_(other, rest) if isinstance(rest, Tensor) else scaled.add_(other, alpha=rest)).clamp_(0, 1)


def hue_turned(image_B3hw: Tensor, turns: float | Tensor) -> Tensor:
    """Colour images with their hue turned by shares of the colour circle, as torchvision's adjust_hue, in fewer passes.

    In HSV a channel is V - S V clamp(2 - |k|, 0, 1), where k is how far, in sixths of the circle, the hue lies from the
    colour opposite to it. Without hue, S V is 0.
    """
    red, green, blue = image_B3hw.split(1, dim=1)
    # Not aminmax, which takes twenty times as long over so short an axis.
    brightest = torch.maximum(torch.maximum(red, green), blue)
    chroma = brightest - torch.minimum(torch.minimum(red, green), blue)
    per_chroma = chroma.clamp_min(1e-12).reciprocal_()
    sixths = torch.where(brightest == green, (blue - red) * per_chroma + 2, (red - green) * per_chroma + 4)
    sixths = torch.where(brightest == red, (green - blue) * per_chroma, sixths).add_(6 * turns)
    channels = []
    for offset in (3, 1, -1):
        k = sixths + offset
        k.sub_((k / 6).round_(), alpha=6).abs_().neg_().add_(2).clamp_(0, 1)
        channels.append(torch.addcmul(brightest, k, chroma, value=-1))
    return torch.cat(channels, dim=1)


def blurred(image_BChw: Tensor, deviation: float | Tensor, most: float) -> Tensor:
    """Gaussian blur, cut at the first whole pixel from two deviations on, so that it blurs a little less than its name:
    with 0.90 to 0.99 of the deviation, for deviations of 1 to 4 pixels. (SimCLR's, BYOL's and DINO's kernels reach
    further, with 23 pixels at any deviation.) No further than the mirrored border reaches; 0 leaves a row alone.

    Separable, and a sum of shifted images: on a CPU many times as fast as a convolution of each channel by itself.

    Args:
        deviation: in pixels.
        most: no deviation is above it.
    """
    radius = min(math.ceil(2 * most), *(side - 1 for side in image_BChw.shape[2:]))
    offset_K1111 = torch.arange(-radius, radius + 1, device=image_BChw.device)[(..., *[None] * 4)]
    deviation = torch.as_tensor(deviation, device=image_BChw.device)
    weights_K1111 = (-0.5 * (offset_K1111 / deviation.clamp_min(1e-6)).square()).exp()
    weights_K1111 = weights_K1111 * (offset_K1111.abs() <= (2 * deviation).ceil())
    weights = (weights_K1111 / weights_K1111.sum(dim=0)).unbind()
    padded = nnf.pad(image_BChw, [radius] * 4, mode="reflect")
    return _weighted(_weighted(padded, weights, 3), weights, 2)


def _weighted(image_BChw: Tensor, weights: Sequence[Tensor], dim: int) -> Tensor:
    length = image_BChw.shape[dim] - len(weights) + 1
    total = image_BChw.narrow(dim, 0, length) * weights[0]
    for offset, weight in enumerate(weights[1:], start=1):
        total.addcmul_(image_BChw.narrow(dim, offset, length), weight)
    return total
