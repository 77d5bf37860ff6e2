"""Printed capital letters, 28 x 28 grey, from the fonts that matplotlib brings along. Nothing is downloaded."""

import string
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lightspan.datamodules.image.sets.small import Labelled

SIDE, NOISE = 28, 12.0
FONTS = (
    *(f"DejaVuSans{kind}" for kind in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{kind}" for kind in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{kind}" for kind in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{kind}" for kind in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10"),
)


def letters(count: int = 4000, seed: int = 0) -> Labelled:
    """A to Z in turn, white on black, each in a font, size, turn, slant and place of its own, with noise in each pixel.

    Args:
        count: of pictures.
        seed: of all that is drawn.
    """
    draws = np.random.default_rng(seed)
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images = np.empty((count, SIDE, SIDE), dtype=np.uint8)
    labels = np.arange(count) % len(string.ascii_uppercase)
    for i, label in enumerate(labels):
        font = ImageFont.truetype(str(fonts / f"{draws.choice(FONTS)}.ttf"), int(draws.integers(16, 25)))
        picture = Image.new("L", (SIDE, SIDE))
        middle = (SIDE / 2 + draws.uniform(-2.5, 2.5), SIDE / 2 + draws.uniform(-2.5, 2.5))
        ImageDraw.Draw(picture).text(middle, string.ascii_uppercase[label], fill=255, font=font, anchor="mm")
        angle, slant = np.radians(draws.uniform(-20, 20)), draws.uniform(-0.3, 0.3)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[1, slant], [0, 1]]
        shift = SIDE / 2 - turn @ [SIDE / 2, SIDE / 2]  # about the middle
        numbers = (*turn[0], shift[0], *turn[1], shift[1])
        picture = picture.transform((SIDE, SIDE), Image.Transform.AFFINE, numbers, Image.Resampling.BILINEAR)
        noisy = np.asarray(picture) + draws.normal(0, NOISE, (SIDE, SIDE))
        images[i] = noisy.clip(0, 255).astype(np.uint8)
    return Labelled(images, labels.astype(np.int64))
