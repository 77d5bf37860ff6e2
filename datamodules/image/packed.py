"""Pictures decoded once, at one size, into a file that all ranks, workers and later runs read.

Decoding a picture takes milliseconds and drawing its views about as long; reading it decoded takes microseconds. The
file is mapped, not loaded: memory is the system's file cache, and a set may be larger than the machine's.
Shapes: N pictures, S side in pixels.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lightspan.core.files.foreign import content_of
from lightspan.core.files.places import CachePath, PathUse
from lightspan.datamodules.image.picture_files import PictureFiles
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.packs import PackCache, file_state
from lightspan.datamodules.shards.decoders import decode_image
from lightspan.datamodules.shards.headers import UNDECODABLE

Fit = Literal["crop", "pad"]
PIXELS = "pixels.npy"
VERSION = 1  # of what becomes of a picture; another one packs anew
BATCH = 32


def fitted(image: Tensor, size: int, fit: Fit, background: int) -> Tensor:
    """uint8 [C, H, W] -> [C, size, size], scaled with antialiasing; neither side is distorted.

    Args:
        fit: "crop" scales the shorter side to `size` and cuts out the middle; "pad" scales the longer side and puts
            `background` around.
    """
    _, height, width = image.shape
    scale = size / (min(height, width) if fit == "crop" else max(height, width))
    scaled = [max(1, round(side * scale)) for side in (height, width)]
    if fit == "crop":  # what lies outside is cut off first, so that a long strip is never scaled as a whole
        image = F.center_crop_image(image, [min(height, round(size / scale)), min(width, round(size / scale))])
        return F.resize_image(image, [size, size], antialias=True)
    image = F.resize_image(image, scaled, antialias=True)
    top, left = (size - scaled[0]) // 2, (size - scaled[1]) // 2
    return F.pad_image(image, [left, top, size - scaled[1] - left, size - scaled[0] - top], fill=float(background))


@dataclass(frozen=True)
class Decoder:
    """What becomes of a picture file: [3, size, size], see `decode_image` and `fitted`."""

    size: int
    fit: Fit
    background: int

    def __call__(self, path: Path) -> Tensor:
        # Twice the size, so that what scales down at the end is still the antialiasing filter.
        image = decode_image(content_of(path), self.background, 2 * self.size)
        return fitted(image, self.size, self.fit, self.background)


@dataclass(frozen=True)
class _Decoded:
    """The pictures of a folder as a loader fetches them: pixels, black if damaged, and what is wrong."""

    files: PictureFiles
    decode: Decoder

    def __len__(self) -> int:
        return len(self.files.names)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        try:
            pixels, damage = self.decode(self.files.folder / self.files.names[index]), ""
        except UNDECODABLE as error:
            reason = error.strerror if isinstance(error, OSError) else None
            pixels, damage = torch.zeros(3, self.decode.size, self.decode.size, dtype=torch.uint8), reason or str(error)
            damage = damage or type(error).__name__
        return {"pixels": pixels, "damage": damage}


@dataclass
class PackedPictures:
    """The pictures of one folder, decoded.

    Attributes:
        folder: of the pack.
        damage: number of a picture that cannot be read -> why.
        content: sha256 of the pixels of all pictures in their order.
    """

    folder: Annotated[Path, PathUse.READ]
    damage: dict[int, str]
    content: str
    _pixels: np.ndarray | None = field(default=None, repr=False)

    def __getitem__(self, number: int) -> np.ndarray:
        """uint8 [3, S, S]."""
        return self.pixels[number]

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [N, 3, S, S], mapped when it is first needed."""
        if self._pixels is None:
            self._pixels = np.load(self.folder / PIXELS, mmap_mode="r", allow_pickle=False)
        return self._pixels

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # another process maps the file itself


class PictureCache:
    """Packs of decoded pictures (`PackCache`), told apart by the files' names, sizes and times and by the decoder's
    settings.

    Args:
        folder, limit_gib: as in `PackCache`.
    """

    def __init__(self, folder: CachePath | None, limit_gib: float) -> None:
        self.packs = PackCache(folder, "pictures", limit_gib)

    def packed(self, files: PictureFiles, decode: Decoder, num_workers: int) -> PackedPictures:
        """The pack of these pictures. Raises: UserError if it would be larger than all packs may be."""
        size = len(files.names) * 3 * decode.size**2
        self.packs.require_room(
            size,
            f"{len(files.names):,} pictures of {decode.size} x {decode.size}",
            "lower data.init_args.size, or pack the files themselves with `lightspan data pack` and train from shards",
        )
        pack, about = self.packs.pack(_key(files, decode), size, partial(_write, files, decode, num_workers))
        return PackedPictures(pack, {int(number): why for number, why in about["damage"].items()}, about["content"])


def _write(files: PictureFiles, decode: Decoder, num_workers: int, folder: Path) -> dict[str, Any]:
    loader = EvaluationLoader(_Decoded(files, decode), BATCH, num_workers=num_workers)
    shape = (len(files.names), 3, decode.size, decode.size)
    damage: dict[int, str] = {}
    digest, done, silent = hashlib.sha256(), 0, not sys.stdout.isatty()
    with (folder / PIXELS).open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for batch in track(loader, "reading pictures", transient=True, disable=silent):
            content = batch["pixels"].numpy().tobytes()
            file.write(content)
            digest.update(content)
            damage |= {done + at: why for at, why in enumerate(batch["damage"]) if why}
            done += len(batch["damage"])
    return {"damage": damage, "content": digest.hexdigest(), "folder": str(files.folder)}


def _key(files: PictureFiles, decode: Decoder) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, decode.size, decode.fit, decode.background]).encode())
    for name in files.names:
        digest.update(json.dumps([name, *file_state(files.folder / name)]).encode())
    return digest.hexdigest()[:32]
