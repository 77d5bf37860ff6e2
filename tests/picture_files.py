"""Folders of small picture files of every kind, for tests."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def pixels(number: int, height: int = 12, width: int = 12) -> np.ndarray:
    """uint8 [H, W, 3], different for each number."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_pictures(folder: Path, classes: dict[str, int], height: int = 12, width: int = 12) -> Path:
    """`classes` names sub-folders ("" for none) and how many pictures each gets."""
    number = 0
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for at in range(count):
            Image.fromarray(pixels(number, height + number % 3, width)).save(folder / name / f"{at:03}.png")
            number += 1
    return folder


def write_every_kind(folder: Path) -> dict[str, Path]:
    """One picture of each kind, half black above and half white below, 8 wide and 16 high as it should be seen."""
    folder.mkdir(parents=True, exist_ok=True)
    grey = np.repeat(np.array([0, 255], np.uint8), 8)[:, None].repeat(8, axis=1)
    rgb = Image.fromarray(np.stack([grey] * 3, axis=2))
    paths = {}

    def save(image: Image.Image, name: str, **options: object) -> None:
        paths[name] = folder / name
        image.save(paths[name], **options)

    save(rgb, "rgb.png")
    save(rgb, "rgb.JPEG", quality=95)
    save(rgb, "rgb.webp", lossless=True)
    save(rgb.convert("L"), "grey.png")
    save(Image.fromarray(grey.astype(np.uint16) * 257), "grey16.png")
    save(rgb.convert("P"), "palette.png")
    save(rgb.convert("CMYK"), "cmyk.jpg", quality=95)
    save(rgb.convert("1"), "bits.png")
    save(rgb, "rgb.bmp")
    save(rgb, "two.GIF", save_all=True, append_images=[rgb.rotate(180)])
    save(rgb, "rgb.tif", compression="tiff_lzw")
    save(Image.fromarray(grey.astype(np.uint16) * 257), "grey16.tiff", save_all=True, append_images=[rgb.rotate(180)])
    # Transparent where it is white, with black below the transparency.
    alpha = Image.fromarray(np.dstack([np.zeros((16, 8, 3), np.uint8), 255 - grey]), "RGBA")
    save(alpha, "alpha.png")
    save(alpha.convert("LA"), "grey_alpha.png")
    save(rgb.convert("P"), "palette_alpha.png", transparency=rgb.convert("P").getpixel((0, 15)))
    exif = Image.Exif()
    exif[0x0112] = 8  # turn it by 90 degrees to see it upright
    save(rgb.rotate(-90, expand=True), "turned.jpg", quality=95, exif=exif)
    return paths


def write_tiffs(folder: Path, classes: Mapping[str, int], bands: int = 2, side: int = 8) -> str:
    """uint16 TIFFs of random numbers, `bands` planes after one another, in a folder for each class: 0.tif, 1.tif."""
    tifffile = pytest.importorskip("tifffile")
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for one in range(count):
            pixels = np.random.default_rng((number, one)).integers(1, 10_000, (bands, side, side), dtype=np.uint16)
            tifffile.imwrite(folder / name / f"{one}.tif", pixels, planarconfig="separate", photometric="minisblack")
    return str(folder)
