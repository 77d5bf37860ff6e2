"""Clips of faces with their shading from tar shards, as frozen networks made them once: what relightable video
diffusion trains on.

Source: Guo et al., "High-Fidelity Relightable Monocular Portrait Animation with Lighting-Controllable Video Diffusion
Model", CVPR 2025, arXiv 2502.19894.
Shapes: C channels, T frames, H W sides of a latent, h w sides of a picture, E numbers of an embedding.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.shards.decoders import decode_array, decode_class, place_of
from lightspan.datamodules.shards.headers import UNDECODABLE
from lightspan.datamodules.shards.stand_ins import NOWHERE, npy
from lightspan.datamodules.shards.stream import Decoding, Shards
from lightspan.datamodules.video.batch import LitClipBatch

COLOURS = 3


@dataclass(frozen=True)
class LitClipDecoding(Decoding):
    """As `Decoding`, of clips.

    Args:
        shape, pixels, embedding, scale, fps: those of `LitClipShards`.
    """

    batch_type = LitClipBatch

    shape: tuple[int, int, int, int]
    pixels: tuple[int, int]
    embedding: int
    scale: float
    fps: float

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        C, T, *sides = self.shape
        try:
            found = {
                "clip": self.scale * self._read(members, "clip", (T, C, *sides)).transpose(0, 1),
                "fps": torch.tensor(self.fps),
                "face": (self._read(members, "face", (T, *sides)) > 0.5).long(),
                "reference": self.scale * self._read(members, "reference", (C, *sides)),
                "reference_face": (self._read(members, "reference_face", (*sides,)) > 0.5).long(),
                "portrait": 2 * self._read(members, "portrait", (COLOURS, *self.pixels)) - 1,
                "shading": self._read(members, "shading", (T, COLOURS, *self.pixels)).transpose(0, 1),
                "label": decode_class(members.get("cls", b"0")),
            }
            if self.embedding:
                found["embedding"] = self._read(members, "embedding", (self.embedding,))
            return found
        except UNDECODABLE as error:
            raise UserError(f"{place_of(members)} cannot be used: {error}") from error

    def _read(self, members: dict[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
        """float32, of bytes a 255th. Raises: ValueError for none, another shape, or numbers that are not finite."""
        if f"{name}.npy" not in members:
            raise ValueError(f"it has no {name}.npy")
        stored = decode_array(members[f"{name}.npy"])
        if stored.shape != shape or not (stored.is_floating_point() or stored.dtype == torch.uint8):
            raise ValueError(
                f"its {name}.npy is {stored.dtype} {[*stored.shape]}, and must be floats or bytes {[*shape]} by shape, "
                "pixels and embedding of data.init_args"
            )
        values = stored.float()
        if not values.isfinite().all():
            raise ValueError(f"its {name}.npy has NaN or infinite numbers; make it again, in float32")
        return values / 255 if stored.dtype == torch.uint8 else values


class LitClipShards(Shards):
    """Batches are `LitClipBatch`. Order, resume, damage and memory are those of `Shards`.

    Args:
        shards, val_shards: as in `Shards`. A sample has these arrays, floats or bytes, of which 255 is 1: KEY.clip.npy
            [T C H W] and KEY.reference.npy [C H W], latents as the autoencoder gives them; KEY.face.npy [T H W] and
            KEY.reference_face.npy [H W], 1 on the face; KEY.portrait.npy [3 h w], the reference in pixels in [0, 1];
            KEY.shading.npy [T 3 h w]; with `embedding` KEY.embedding.npy [E]; and KEY.cls, the person, 0 where it is
            absent.
        shape: C, T, H, W; the autoencoder of Stable Video Diffusion makes 4 x 64 x 64 of 512 x 512 pixels.
        pixels: h, w.
        embedding: E, 0 for none; CLIP's of the reference has 1024.
        scale: factor that brings latents to about unit variance; 0.18215 is Stable Video Diffusion's.
        fps: frames of a clip a second, above 0.
        settings: those of `Shards` but `fields`, `image_size`, `mean`, `std`, `views` and `views_on`.
    """

    def __init__(
        self,
        shards: list[ReadPath],
        val_shards: list[ReadPath] | None = None,
        shape: tuple[int, int, int, int] = (4, 16, 64, 64),
        pixels: tuple[int, int] = (512, 512),
        embedding: int = 1024,
        scale: float = 0.18215,
        fps: float = 6.25,
        **settings: Any,
    ) -> None:
        require_in("[1, inf)", shape=shape, pixels=pixels)
        require_in("[0, inf)", embedding=embedding)
        require_in("(0, inf)", scale=scale, fps=fps)
        numbers = math.prod(shape) + COLOURS * (shape[1] + 1) * math.prod(pixels) + embedding
        require_numbers(numbers, shape=shape, pixels=pixels, embedding=embedding)
        super().__init__(shards, val_shards, fields={"clip": "npy"}, **settings)
        if self.decode.image_size is not None or self.decode.image.views is not None:
            raise UserError(
                "LitClipShards takes no image_size and no views: latents and shading would no longer fit; crop and "
                "change videos before they are encoded"
            )
        plain = vars(self.decode)
        self.decode: LitClipDecoding = LitClipDecoding(
            **plain, shape=shape, pixels=pixels, embedding=embedding, scale=scale, fps=fps
        )

    @property
    def bounds(self) -> None:  # type: ignore[override]
        """Latents have no black and white."""

    def example(self) -> dict[str, Any]:
        """A clip of zeros."""
        C, T, H, W = self.decode.shape
        h, w = self.decode.pixels
        sides = {
            "clip": (T, C, H, W),
            "reference": (C, H, W),
            "face": (T, H, W),
            "reference_face": (H, W),
            "portrait": (COLOURS, h, w),
            "shading": (T, COLOURS, h, w),
            "embedding": (self.decode.embedding,),
        }
        arrays = {f"{name}.npy": npy(np.zeros(shape, np.uint8)) for name, shape in sides.items()}
        return self.decode(NOWHERE | arrays, seed=0)
