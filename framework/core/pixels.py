"""Pictures of numbers as PNG files, which keep every pixel."""

from io import BytesIO

import numpy as np
from PIL import Image
from torch import Tensor


def png_of(brightness_CHW: Tensor) -> bytes:
    """A PNG of 8 bits a channel: grey for C = 1, RGB for C = 3.

    Args:
        brightness_CHW: floats in [0, 1], on any device; black is 0. The nearest of 256 steps is stored.
    """
    pixels_CHW = (255 * brightness_CHW).round().byte().cpu()
    return png_of_bytes((pixels_CHW[0] if len(pixels_CHW) == 1 else pixels_CHW.permute(1, 2, 0)).numpy())


def png_of_bytes(pixels: np.ndarray) -> bytes:
    """The same of uint8, [H W] for grey or [H W 3] for RGB."""
    content = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(content, "PNG")
    return content.getvalue()
