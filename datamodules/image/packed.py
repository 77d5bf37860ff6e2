"""Pictures decoded once, at one size, into a file that all ranks, workers and later runs read.

Decoding a picture takes milliseconds and drawing its views about as long; reading it decoded takes microseconds. The
file is mapped, not loaded: memory is the system's file cache, and a set may be larger than the machine's.
Shapes: N pictures, S side in pixels.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from filelock import FileLock
from rich.progress import track
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import atomic_path, explained_os_errors
from lightspan.core.files.caches import CacheFolder
from lightspan.core.files.foreign import content_of
from lightspan.core.files.places import CachePath, PathUse
from lightspan.datamodules.image.picture_files import PictureFiles
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.shards.decoders import decode_image
from lightspan.datamodules.shards.headers import UNDECODABLE

Fit = Literal["crop", "pad"]
PIXELS, ABOUT = "pixels.npy", "about.json"
SETTING = "data.init_args.cache_dir"
VERSION = 1  # of what becomes of a picture; another one packs anew
BATCH = 32
GIB = 2**30


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
    """Packs of decoded pictures, told apart by the files' names, sizes and times and by the decoder's settings.

    Before a new pack is written, those used longest ago make room for it. In a dry run a pack that is there is read,
    and any other is written to a temporary folder.

    Args:
        folder: None means $XDG_CACHE_HOME/lightspan/pictures, usually below ~/.cache.
        limit_gib: of all packs together.
    """

    def __init__(self, folder: CachePath | None, limit_gib: float) -> None:
        self.cache, self.limit_bytes = CacheFolder(folder, "pictures", SETTING), int(limit_gib * GIB)

    def packed(self, files: PictureFiles, decode: Decoder, num_workers: int) -> PackedPictures:
        """The pack of these pictures, written now unless it is there; other processes wait meanwhile.

        Raises: UserError if it would be larger than all packs may be.
        """
        size = len(files.names) * 3 * decode.size**2
        if size > self.limit_bytes:
            raise UserError(
                f"{len(files.names):,} pictures of {decode.size} x {decode.size} take {size / GIB:.1f} GiB decoded, "
                f"above cache_gib={self.limit_bytes / GIB:g}; raise data.init_args.cache_gib, lower "
                "data.init_args.size, or pack the files themselves with `lightspan data pack` and train from shards"
            )
        name = _key(files, decode)
        if (held := self.cache.held(f"{name}/{ABOUT}")) is not None:
            pack = held.parent
        else:
            part = self.cache.part()
            pack = part / name
            with explained_os_errors(pack, setting=SETTING), FileLock(pack.with_suffix(".lock")):
                if not (pack / ABOUT).is_file():
                    self._make_room(part, size)
                    self._pack(files, decode, num_workers, pack)
                os.utime(pack)  # the time of its last use
        about = json.loads((pack / ABOUT).read_text())
        return PackedPictures(pack, {int(number): why for number, why in about["damage"].items()}, about["content"])

    def _pack(self, files: PictureFiles, decode: Decoder, num_workers: int, pack: Path) -> None:
        loader = EvaluationLoader(_Decoded(files, decode), BATCH, num_workers=num_workers)
        shape = (len(files.names), 3, decode.size, decode.size)
        damage: dict[int, str] = {}
        digest, done, silent = hashlib.sha256(), 0, not sys.stdout.isatty()
        with atomic_path(pack, setting=SETTING) as temporary:
            temporary.mkdir()
            with (temporary / PIXELS).open("wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for batch in track(loader, "reading pictures", transient=True, disable=silent):
                    content = batch["pixels"].numpy().tobytes()
                    file.write(content)
                    digest.update(content)
                    damage |= {done + at: why for at, why in enumerate(batch["damage"]) if why}
                    done += len(batch["damage"])
            about = {"damage": damage, "content": digest.hexdigest(), "folder": str(files.folder)}
            (temporary / ABOUT).write_text(json.dumps(about) + "\n")

    def _make_room(self, part: Path, incoming: int) -> None:
        packs = {about.parent: about.parent.stat().st_mtime for about in part.glob(f"*/{ABOUT}")}
        sizes = {pack: sum(file.stat().st_size for file in pack.iterdir()) for pack in packs}
        total = incoming + sum(sizes.values())
        for pack in sorted(packs, key=lambda pack: packs[pack]):
            if total <= self.limit_bytes:
                return
            # A run that has mapped it keeps it until it ends; the minute is for one that is about to.
            if packs[pack] < time.time() - 60:
                shutil.rmtree(pack, ignore_errors=True)
                total -= sizes[pack]


def _key(files: PictureFiles, decode: Decoder) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, decode.size, decode.fit, decode.background]).encode())
    for name in files.names:
        try:
            stat = os.stat(files.folder / name)
            state = (stat.st_size, stat.st_mtime_ns)
        except OSError:  # a link to nothing: decoding says so
            state = (-1, -1)
        digest.update(json.dumps([name, *state]).encode())
    return digest.hexdigest()[:32]
