"""Images of two domains from tar shards of each, with a class for each pixel of the first: GTA5 and Cityscapes, say."""

from dataclasses import replace
from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.image.augment.views import Views
from lightspan.datamodules.image.batch import DomainsBatch
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.loading.order import Order
from lightspan.datamodules.loading.ranks import say, train_loader
from lightspan.datamodules.shards.decoders import MASK
from lightspan.datamodules.shards.masked import MaskedShards
from lightspan.datamodules.shards.samples import ShardSamples
from lightspan.datamodules.shards.stand_ins import NOWHERE, black_png
from lightspan.datamodules.shards.stream import tell, written_out


class DomainPairs:
    """Each sample of one set beside one of another, drawn anew in each epoch: a function of number and seed."""

    batch_type = DomainsBatch

    def __init__(self, source: ShardSamples, target: ShardSamples) -> None:
        self.source, self.target = source, target

    def __len__(self) -> int:
        return len(self.source)

    def order(self, window: int) -> Order:
        """The source's. Another target counts as other data too."""
        own, other = self.source.order(window), self.target.order(window)
        return replace(own, content=own.content[:16] + other.content[:16], damage=own.damage + other.damage)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        # With the number too, since a sample that replaces a damaged one has the same seed.
        draws = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
        number, own_seed = int(draws.integers(len(self.target))), int(draws.integers(2**63))
        return self.target.sample(number, own_seed) | self.source.sample(index, seed)


class DomainShards(MaskedShards):
    """Training batches are `DomainsBatch`: each image of the source once in an epoch, with the class of each pixel, and
    beside each one of the target, drawn at random. Validation batches have `target_image`, `target_semantic` and
    `index`, those of the bank `image`, `semantic` and `index`. Resume, ranks and damage are those of `Shards`; so is
    the order, with that of the source.

    A sample is KEY.jpg (png, webp) and, where it has a mask, KEY.mask.png of the same size: one channel, grey or with a
    palette, whose numbers are classes. Crop, size, angle and mirror of a view are those of the mask too, in which
    nothing is blended; a pixel without a class is -1 in a batch.

    Memory: as `Shards`, and shards of the target are all in use at a time.

    Args:
        shards: of the source, with masks.
        target_shards: of the target.
        val_shards: of the target, with masks, read once in each validation; None means no validation.
        num_classes: K, at least 2.
        ignore_label: number of a pixel without a class in a mask, not one of the classes.
        view, target_view: make the one view of an image in training, such as a `RandomViews` with count=1.
        sides: height and width in pixels to which images without a view are scaled, as those of bank and validation.
        target_masks: whether the training images of the target have masks too, which a method reads to judge itself.
        settings: `batch_size`, `mean`, `std`, `window`, `seed`, `num_workers` and the others of `Shards` but `fields`,
            `image_size`, `views`, `views_on` and `hold_out`.
    """

    batch_type = DomainsBatch

    def __init__(
        self,
        shards: list[ReadPath],
        target_shards: list[ReadPath],
        val_shards: list[ReadPath] | None = None,
        num_classes: int = 19,
        ignore_label: int = 255,
        view: Views | None = None,
        target_view: Views | None = None,
        sides: tuple[int, int] | None = None,
        target_masks: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(shards, val_shards, num_classes, ignore_label, view, sides, **settings)
        self.target_shards = written_out("target_shards", target_shards)
        if not self.target_shards:
            raise UserError("target_shards is an empty list; name at least one tar file")
        self.require_one_view("target_view", target_view)
        image, plain = replace(self.decode.image, views=target_view), replace(self.decode.plain(), prefix="target_")
        fields = self.decode.fields if target_masks else {"image": self.decode.fields["image"]}
        self.decode_val, self.decode_target = plain, replace(plain, image=image, fields=fields)
        self.target: ShardSamples | None = None

    def setup(self, stage: str | None = None) -> None:
        """As `Shards.setup`, and the samples of the target."""
        if self.train is not None:
            return
        super().setup(stage)
        assert self.val is not None
        self.val = self.val.decoded_by(self.decode_val)
        self.target = self._samples("target_shards", self.target_shards, self.decode_target)
        say(f"target_shards: {len(self.target_shards)} with {len(self.target):,} training samples")
        tell(self.target)

    def train_dataloader(self) -> ExactLoader:
        assert self.train is not None
        assert self.target is not None
        pairs = DomainPairs(self.train, self.target)
        order = pairs.order(self.window)
        settings = self.batch_size, self.seed, self.num_workers, self.trainer
        return train_loader(pairs, *settings, order, self.selection)

    def example(self) -> dict[str, Any]:
        """Black pictures, all of class 0."""
        members = NOWHERE | {"png": black_png(720, 1280), MASK: black_png(720, 1280, channels=1)}
        return self.decode(members, 0) | self.decode_target(members, 1)
