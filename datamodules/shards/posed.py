"""Two renders of each object with the parameters of both, from tar shards, such as 3DIEBench's packed by object."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.augment.views import seeded
from lightspan.datamodules.image.batch import ImageBatch, ViewsBatch
from lightspan.datamodules.shards.decoders import IMAGES, decode_fields, place_of
from lightspan.datamodules.shards.stand_ins import NOWHERE, black_png, npy
from lightspan.datamodules.shards.stream import Decoding, Shards


@dataclass(frozen=True)
class PosedDecoding(Decoding):
    """Two of an object's renders as its views, drawn from the seed; or its first render as its image.

    Args:
        columns: P, numbers that tell how a render was made.
        paired: whether there are two.
    """

    columns: int
    paired: bool = True

    @property
    def batch_type(self) -> type:
        return ViewsBatch if self.paired else ImageBatch

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        renders = sorted(name for name in members if name.rpartition(".")[2] in IMAGES)
        table: Tensor = decode_fields(members, {"parameters": "npy"})["parameters"]
        if len(renders) < 2 or table.shape != (len(renders), self.columns):
            raise UserError(
                f"{place_of(members)} has {len(renders)} renders and parameters {list(table.shape)}; it needs two or "
                f"more and columns={self.columns} numbers for each"
            )
        if not self.paired:
            return self._render(members, renders[0], seed)
        with seeded(seed):
            chosen = torch.randperm(len(renders))[:2]
        samples = [self._render(members, renders[int(number)], seed) for number in chosen]
        views = [sample.pop("image") for sample in samples]
        return samples[0] | {"views": views, "parameters": table[chosen].float()}

    def _render(self, members: dict[str, Any], name: str, seed: int) -> dict[str, Any]:
        return super().__call__(members | {name.rpartition(".")[2]: members[name]}, seed)


class PosedShards(Shards):
    """Training batches are `ViewsBatch` whose two views are different renders of one object, drawn anew in each epoch,
    and whose `parameters` are the data's own; nothing else changes them. Bank and validation have each object's first
    render, as `ImageBatch`. Order, resume, damage and memory are those of `Shards`; a sample is an object.

    Args:
        shards, val_shards: as in `Shards`. An object has members KEY.000.jpg, KEY.001.jpg and so on, two or more;
            KEY.npy, numbers [R, P] of its R renders, in the order of their names; and KEY.cls, its class.
        columns: P, at least 1; a unit quaternion (w x y z) first has 4.
        settings: `batch_size`, `image_size`, `mean`, `std`, `window`, `seed`, `num_workers` and the others of `Shards`
            but `fields` and `views`.
    """

    def __init__(
        self, shards: list[ReadPath], val_shards: list[ReadPath] | None = None, columns: int = 4, **settings: Any
    ) -> None:
        if columns < 1:
            raise UserError(f"PosedShards columns={columns} must be at least 1")
        require_numbers(2 * columns, columns=columns)
        super().__init__(shards, val_shards, fields={"image": "|".join(IMAGES), "label": "cls"}, **settings)
        self.columns, plain = columns, self.decode
        self.decode = PosedDecoding(**vars(plain), columns=columns)
        self.decode_single = PosedDecoding(**vars(plain), columns=columns, paired=False)

    def setup(self, stage: str | None = None) -> None:
        """As `Shards.setup`; bank and validation samples then have one render."""
        if self.train is None:
            super().setup(stage)
            assert self.val is not None
            self.bank, self.val = (samples.decoded_by(self.decode_single) for samples in (self.bank, self.val))

    def example(self) -> dict[str, Any]:
        """An object of two black renders."""
        renders = dict.fromkeys(("000.png", "001.png"), black_png(256, 256))
        table = npy(np.ones((2, self.columns), np.float32))
        return self.decode(NOWHERE | {"cls": b"0", "npy": table, **renders}, seed=0)
