"""Latents of pictures, which a frozen autoencoder made once, from tar shards: what latent diffusion trains on.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2021, arXiv 2112.10752.
Shapes: C channels, H W latent.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.datamodules.shards.decoders import decode_array, decode_class, place_of
from lightspan.datamodules.shards.headers import UNDECODABLE
from lightspan.datamodules.shards.stand_ins import NOWHERE, npy
from lightspan.datamodules.shards.stream import Decoding, Shards

LOG_VARIANCES = (-30.0, 20.0)  # to which the autoencoder of Stable Diffusion clips its logarithms of variances


@dataclass(frozen=True)
class LatentDecoding(Decoding):
    """As `Decoding`, of latents.

    Args:
        shape, scale: those of `LatentShards`.
    """

    batch_type = ImageBatch

    shape: tuple[int, int, int]
    scale: float

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        try:
            if "npy" not in members:
                raise ValueError("it has no .npy member with the latent, [C H W], or mean and log-variance, [2C H W]")
            image = self.scale * self._latent(decode_array(members["npy"]), seed)
            return {"image": image, "label": decode_class(members.get("cls", b"0"))}
        except UNDECODABLE as error:
            raise UserError(f"{place_of(members)} cannot be used: {error}") from error

    def _latent(self, stored: Tensor, seed: int) -> Tensor:
        """float32 [C H W]. Raises: ValueError for another shape, and for numbers that are not real or not finite."""
        channels, *sides = self.shape
        if not stored.is_floating_point() or [*stored.shape] not in ([*self.shape], [2 * channels, *sides]):
            raise ValueError(
                f"its array is {stored.dtype} {[*stored.shape]}, and data.init_args.shape={[*self.shape]} asks for "
                f"floats of that shape, or of {[2 * channels, *sides]}, mean and log-variance"
            )
        stored = stored.float()  # in which a number of float64 may be infinite
        if not stored.isfinite().all():
            raise ValueError("its array has NaN or infinite numbers; encode the picture again, in float32")
        mean, *rest = stored.split(channels)
        if not rest:
            return mean
        fresh = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
        return mean + (rest[0].clamp(*LOG_VARIANCES) / 2).exp() * fresh


class LatentShards(Shards):
    """Batches are `ImageBatch`, whose `image` is a latent. Order, resume, damage and memory are those of `Shards`.

    Args:
        shards, val_shards: as in `Shards`. A sample has KEY.npy, a latent [C H W], or the mean and the logarithm of the
            variance of its distribution, [2C H W]: training then draws it anew in each epoch, and validation draws
            the same each time. KEY.cls is its class, 0 where it is absent. Mirrored pictures are samples of their own,
            encoded mirrored.
        shape: C, H, W; the autoencoder of Stable Diffusion makes [4, 32, 32] of 256 x 256 pixels.
        scale: factor that brings latents to about unit variance; 0.18215 is Stable Diffusion's. Shards hold what the
            autoencoder gives, without it.
        settings: those of `Shards` but `fields`, `image_size`, `mean`, `std`, `views` and `views_on`.
    """

    def __init__(
        self,
        shards: list[ReadPath],
        val_shards: list[ReadPath] | None = None,
        shape: tuple[int, int, int] = (4, 32, 32),
        scale: float = 0.18215,
        **settings: Any,
    ) -> None:
        if min(shape) < 1 or not 0 < scale < float("inf"):
            raise UserError(f"LatentShards shape={[*shape]} must be at least 1 each, and scale={scale} finite, above 0")
        require_numbers(2 * math.prod(shape), shape=shape)
        super().__init__(shards, val_shards, fields={"image": "npy"}, **settings)
        if self.decode.image_size is not None or self.decode.image.views is not None:
            raise UserError(
                "LatentShards takes no image_size and no views: neither means anything for latents; crop and change "
                "pictures before the autoencoder encodes them"
            )
        self.decode: LatentDecoding = LatentDecoding(**vars(self.decode), shape=shape, scale=scale)

    @property
    def bounds(self) -> None:  # type: ignore[override]
        """Latents have no black and white."""

    def example(self) -> dict[str, Any]:
        """A latent of zeros with class 0."""
        return self.decode(NOWHERE | {"npy": npy(np.zeros(self.decode.shape, np.float32))}, seed=0)
