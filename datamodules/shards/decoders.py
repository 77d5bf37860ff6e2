"""From the bytes of a shard's members to values: one explicit decoder for each ending, nothing run or unpickled."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.arrays import read_array
from lightspan.datamodules.audio.sound import SOUNDS, header, read
from lightspan.datamodules.multispectral.tiffs import read_tiff
from lightspan.datamodules.shards.headers import UNDECODABLE, open_image, require_all_rows

IMAGES = ("jpg", "jpeg", "png", "webp")
MASK = "mask.png"


def decode_image(content: bytes, background: int | None = None, least: int | None = None) -> Tensor:
    """What `rgb` makes of an encoded image.

    Args:
        background: as in `rgb`.
        least: a large JPEG may be decoded at a half, a quarter or an eighth of its size, which is several times faster,
            as long as both sides keep this many pixels.
    Raises: ValueError as `open_image`, OSError and others of `UNDECODABLE` if damaged.
    """
    with open_image(content) as image:
        if least is not None:
            image.draft("RGB", (least, least))  # leaves all but JPEGs as they are
        require_all_rows(image, content)
        return rgb(image, background)


def rgb(image: Image.Image, background: int | None = None) -> Tensor:
    """uint8 [3, H, W], rotated upright according to the EXIF orientation.

    Grey becomes three equal channels; palettes and CMYK become RGB. 16 bits per channel become 8: grey v is
    round(v / 257), and colours lose their lower 8 bits.

    Args:
        background: grey in [0, 255] that shows through where the image is transparent; None drops transparency, so the
            colours under it show.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would not scale but clip at 255
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return torch.from_numpy(grey.astype(np.uint8)).repeat(3, 1, 1)
    if background is not None and image.has_transparency_data:
        behind = Image.new("RGBA", image.size, (background, background, background, 255))
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def decode_mask(content: bytes) -> Tensor:
    """A number for each pixel, uint8 or, of 16 bits, int32 [H, W], from a PNG: its grey, or places in its palette.

    Raises: ValueError for other files and for several channels, and as `decode_image`.
    """
    with open_image(content) as image:
        if image.format != "PNG":
            raise ValueError(f"it is a {image.format}, and a mask is a PNG, which keeps numbers as they are")
        if len(image.getbands()) != 1:
            raise ValueError(
                f"it has {len(image.getbands())} channels ({image.mode}), and a mask has one; save it as grey, or with "
                "a palette"
            )
        require_all_rows(image, content)
        numbers_HW = np.asarray(image)
    return torch.from_numpy(numbers_HW.astype(np.uint8 if numbers_HW.dtype.itemsize == 1 else np.int32))


def decode_array(content: bytes) -> Tensor:
    """The tensor of a .npy file. Raises: ValueError for an array of objects, which would need pickle."""
    return torch.from_numpy(read_array(content))


def decode_tiff(content: bytes) -> Tensor:
    """[S H W] of a TIFF with S bands, whose word decides which axis is theirs: float or int64.

    Raises: ValueError for complex numbers and for what is no TIFF; UserError without tifffile.
    """
    pixels = read_tiff(content, None)
    # torch has next to no operators for uint16 and uint32.
    return torch.from_numpy(pixels if pixels.dtype.kind == "f" else pixels.astype(np.int64))


def decode_sound(content: bytes) -> Tensor:
    """The mean of the channels of a recording at its own rate, float32 [N].

    Raises: ValueError as `lightspan.datamodules.audio.sound.read`.
    """
    return torch.from_numpy(read(content)[0])


def decode_text(content: bytes) -> str:
    return content.decode("utf-8")


def decode_class(content: bytes) -> int:
    """The number of a class, in [0, 10^18). Raises: ValueError for anything else."""
    digits = content.decode("ascii").strip()
    if not re.fullmatch(r"\d{1,18}", digits):
        shown = digits[:20] + "..." * (len(digits) > 20)
        raise ValueError(f"{shown!r} is not a class, which is a whole number from 0 up of at most 18 digits")
    return int(digits)


DECODERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(IMAGES, decode_image),
    MASK: decode_mask,
    **dict.fromkeys(SOUNDS, decode_sound),
    "cls": decode_class,
    "txt": decode_text,
    "json": json.loads,
    "npy": decode_array,
    "tif": decode_tiff,
    "tiff": decode_tiff,
}


def place_of(members: Mapping[str, Any]) -> str:
    """The shard and the key of a sample, for messages."""
    return f"shard {members['__url__']}: sample {one_line(members['__key__'])}"


def decodable(ending: str) -> str:
    """The ending that says how a member is read: its own if it has a decoder, otherwise what follows its last dot, as
    in `1.jpg`, the first picture of a pair.
    """
    return ending if ending in DECODERS else ending.rpartition(".")[2]


def damage_of(ending: str, content: bytes, whole: bool) -> str | None:
    """Why `content` cannot be decoded as its ending says; None if it can, or the ending has no decoder.

    Args:
        whole: False reads only the header of an image or a recording, which takes a thousandth of the time: it finds
            what is empty, not an image or too large, but not each that is truncated.
    """
    ending = decodable(ending)
    try:
        if ending in IMAGES and not whole:
            open_image(content).close()
        elif ending in SOUNDS and not whole:
            header(content)
        elif ending in DECODERS:
            DECODERS[ending](content)
    except UNDECODABLE as error:
        return str(error) or type(error).__name__
    return None


def check_fields(fields: dict[str, str]) -> None:
    """Raises: UserError for an ending that has no decoder."""
    if not fields:
        raise UserError('fields is empty, so batches would be too; write for instance {image: "jpg|png", label: cls}')
    for field, endings in fields.items():
        for ending in endings.split("|"):
            if ending not in DECODERS:
                pickled = "; pickled members are never read" if ending in {"pkl", "pickle", "pyd", "pth", "pt"} else ""
                raise UserError(
                    f"fields: {field} asks for .{ending} members, which have no decoder{pickled}; decoders exist for "
                    + ", ".join(DECODERS)
                )


def decode_fields(sample: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """{field: value}, each from the first of its endings (`"jpg|png"`) that the sample has.

    Raises: UserError that names shard and sample if none is there or its bytes are not what the ending says.
    """
    where = place_of(sample)
    decoded = {}
    for field, endings in fields.items():
        ending = next((ending for ending in endings.split("|") if ending in sample), None)
        if ending is None:
            there = one_line(", ".join(name for name in sample if not name.startswith("__")))
            raise UserError(f"{where} has no .{endings.replace('|', ' or .')} member for {field}; it has {there}")
        try:
            decoded[field] = DECODERS[ending](sample[ending])
        except UNDECODABLE as error:
            raise UserError(f"{where}: its .{ending} member cannot be decoded: {error}") from error
    return decoded
