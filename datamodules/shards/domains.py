"""Images of two domains from tar shards of each, with a class for each pixel of the first, such as GTA5 and Cityscapes.

Shapes: H W image, h w as it is in a batch, K classes.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.image.augment.fields import ImageFields
from lightspan.datamodules.image.augment.rendering import NO_LABEL, nearest
from lightspan.datamodules.image.augment.views import Views, seeded
from lightspan.datamodules.image.batch import DomainsBatch
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.loading.order import Order
from lightspan.datamodules.loading.ranks import say, train_loader
from lightspan.datamodules.shards.decoders import IMAGES, MASK, decode_fields, place_of
from lightspan.datamodules.shards.samples import ShardSamples
from lightspan.datamodules.shards.stand_ins import NOWHERE, black_png
from lightspan.datamodules.shards.stream import Decoding, Shards, tell, written_out


@dataclass(frozen=True)
class MaskedDecoding(Decoding):
    """An image and, if `fields` have it, its mask, both changed by the numbers of one view. `image.views` makes it.

    Args:
        num_classes: K.
        ignore_label: number of a pixel without a class.
        sides: h and w to which what has no view is scaled; None leaves it as it is.
        prefix: of the names of the fields in a sample.
    """

    num_classes: int
    ignore_label: int
    sides: tuple[int, int] | None
    prefix: str = ""

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        decoded = decode_fields(members, self.fields)
        image, mask_HW, views = decoded["image"], decoded.get("semantic"), self.image.views
        classes_HW = None if mask_HW is None else self._classes(mask_HW, image, members)
        if views is not None:
            assert views.drawn is not None
            (rendering,) = views.drawn.renderings
            with seeded(seed):
                (drawn,) = views.drawn.draw(tuple(image.shape))
            image = rendering.one(image, drawn)
            classes_HW = None if classes_HW is None else rendering.labels(classes_HW, drawn)
        elif self.sides is not None:
            whole = (0, 0, *image.shape[1:])
            image = F.resize_image(image, list(self.sides), antialias=True)
            classes_HW = None if classes_HW is None else nearest(classes_HW, whole, *self.sides)
        sample = ImageFields(self.image.mean, self.image.std)(image, seed)
        sample |= {} if classes_HW is None else {"semantic": classes_HW}
        return {self.prefix + name: value for name, value in sample.items()}

    def _classes(self, mask_HW: Tensor, image: Tensor, members: dict[str, Any]) -> Tensor:
        """int64 [H, W]: the class of each pixel, or `NO_LABEL`."""
        where = place_of(members)
        if mask_HW.shape != image.shape[1:]:
            sizes = [" x ".join(map(str, each.shape[-2:])) for each in (mask_HW, image)]
            raise UserError(
                f"{where} has a mask of {sizes[0]} pixels and an image of {sizes[1]}; make them of one size"
            )
        classes_HW = mask_HW.long()
        classes_HW = classes_HW.masked_fill(classes_HW == self.ignore_label, NO_LABEL)
        if (largest := int(classes_HW.max())) >= self.num_classes:
            raise UserError(
                f"{where} has a pixel of class {largest}, and num_classes={self.num_classes} has classes from 0 to "
                f"{self.num_classes - 1} beside ignore_label={self.ignore_label}; correct the masks, or set "
                "data.init_args.num_classes"
            )
        return classes_HW


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


class DomainShards(Shards):
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
        both = {"image": "|".join(IMAGES), "semantic": MASK}
        super().__init__(
            shards, val_shards, fields=both, image_size=None, views=None, views_on="workers", hold_out=0, **settings
        )
        self.target_shards = written_out("target_shards", target_shards)
        if not self.target_shards:
            raise UserError("target_shards is an empty list; name at least one tar file")
        if num_classes < 2 or 0 <= ignore_label < num_classes:
            raise UserError(
                f"DomainShards num_classes={num_classes} must be at least 2, and ignore_label={ignore_label} none of "
                f"the classes from 0 to {num_classes - 1}"
            )
        if sides is not None and min(sides) < 1:
            raise UserError(f"DomainShards sides={[*sides]} must be two numbers of pixels of at least 1")
        for name, given in (("view", view), ("target_view", target_view)):
            if given is not None and (given.drawn is None or len(given.drawn.renderings) != 1):
                raise UserError(
                    f"DomainShards {name} must make one view from drawn numbers, which the mask follows, and not "
                    f"{type(given).__name__}; set a RandomViews with count=1"
                )
        self.num_classes = num_classes
        plain = MaskedDecoding(**vars(self.decode), num_classes=num_classes, ignore_label=ignore_label, sides=sides)
        target_image = replace(plain.image, views=target_view)
        self.decode = replace(plain, image=replace(plain.image, views=view))
        self.decode_val = replace(plain, prefix="target_")
        self.decode_target = replace(
            self.decode_val, image=target_image, fields=both if target_masks else {"image": both["image"]}
        )
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
        return train_loader(pairs, self.batch_size, self.seed, self.num_workers, self.trainer, order)

    def example(self) -> dict[str, Any]:
        """Black pictures, all of class 0."""
        members = NOWHERE | {"png": black_png(720, 1280), MASK: black_png(720, 1280, channels=1)}
        return self.decode(members, 0) | self.decode_target(members, 1)
