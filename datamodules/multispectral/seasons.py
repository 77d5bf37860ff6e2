"""Places in up to several seasons, with tags of their land cover, from tar shards, such as SSL4EO-S12-ML.

Shapes: S bands stored, C bands taken, T seasons, H W pixels, G tags.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.multispectral.bands import Bands
from lightspan.datamodules.multispectral.batch import MultispectralBatch, SeasonsBatch
from lightspan.datamodules.multispectral.resampling import SpectralCrops, square
from lightspan.datamodules.multispectral.shards import MultispectralShards, SpectralDecoding, under_clouds
from lightspan.datamodules.shards.decoders import decode_array, place_of
from lightspan.datamodules.shards.headers import UNDECODABLE
from lightspan.datamodules.shards.tagged import tags_in


@dataclass(frozen=True)
class SeasonDecoding(SpectralDecoding):
    """Makes samples of `SeasonsBatch` where there are crops, else `MultispectralBatch` with tags; where there are no
    moments either, all seasons, to be measured.

    Args:
        num_tags, complete: those of `SeasonShards`.
    """

    num_tags: int
    complete: bool

    @property
    def batch_type(self) -> type:
        return MultispectralBatch if self.crops is None else SeasonsBatch

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        where = place_of(members)
        try:
            values, valid = self._read(members)
            given = json.loads(members["json"]) if "json" in members else None
        except UNDECODABLE as error:
            raise UserError(f"{where} cannot be used: {error}") from error
        tags = tags_in(given, self.num_tags, self.complete, where)
        if self.crops is None and self.moments is not None:
            values, valid = values[:, :1], valid[:, :1]
        if self.image_size is not None:
            values, valid = square(values, valid, self.image_size)
        if self.crops is None:
            if self.moments is None:  # to be measured, over all seasons, as training shows them all
                return {"image": values, "valid": valid.long(), **tags}
            image, seen = self.moments.standardised(values[:, 0], valid[:, 0]), valid[:, 0]
            return {"image": image, "valid": seen.long(), "label": torch.tensor(0), **tags}
        generator = np.random.default_rng(seed)
        # Two of the seasons, or the only one twice.
        two = generator.choice(values.shape[1], 2, replace=values.shape[1] < 2)
        views = [self._view(values[:, t], valid[:, t], int(generator.integers(2**63))) for t in two]
        return {"views": views, **tags}

    def _view(self, values: Tensor, valid: Tensor, seed: int) -> Tensor:
        assert self.crops is not None
        values, valid = self.crops(values, valid, seed)
        return values if self.moments is None else self.moments.standardised(values, valid)

    def _read(self, members: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Reflectance [C T H W], and where it is valid. Raises: ValueError for what is not as described."""
        if "npy" not in members:
            raise ValueError("it has no .npy member with the seasons, [T S H W]")
        stored, count = decode_array(members["npy"]).numpy(), len(self.bands.stored_names)
        if stored.ndim != 4 or not stored.size or stored.shape[1] != count:
            raise ValueError(f"its shape is {list(stored.shape)}, and seasons are [T S H W] of S={count} bands")
        return under_clouds(members, *self.bands.reflectance(np.moveaxis(stored, 1, 0)))


class SeasonShards(MultispectralShards):
    """Training batches of `SeasonsBatch`: two seasons of each place, drawn anew in each epoch, each cropped by
    itself; of a place with one season both views show it. Validation and bank have the first season whole, as
    `MultispectralBatch` with `tags` and `tags_known`. Order, resume, damage and memory are those of `Shards`.

    Args:
        shards, val_shards: as in `Shards`. A sample has KEY.npy, its seasons [T S H W], and KEY.json, its tags, as in
            `TaggedShards`; a place without KEY.json has none. KEY.clouds.npy, [T H W], is as in `MultispectralShards`.
        bands: what is stored and what of it is taken.
        num_tags: G, at least 1.
        crops: of a training view.
        complete: whether tags that are in neither list count as absent or as unknown.
        settings: those of `MultispectralShards` but `dates`.
    """

    def __init__(
        self,
        shards: list[ReadPath],
        bands: Bands,
        num_tags: int,
        crops: SpectralCrops,
        val_shards: list[ReadPath] | None = None,
        complete: bool = True,
        **settings: Any,
    ) -> None:
        if num_tags < 1:
            raise UserError(f"SeasonShards num_tags={num_tags} must be at least 1")
        require_numbers(2 * num_tags, num_tags=num_tags)
        super().__init__(shards, bands, val_shards, dates=1, crops=crops, **settings)
        self.num_tags = num_tags
        self.decode = SeasonDecoding(**vars(self.decode), num_tags=num_tags, complete=complete)
