"""Images with a class for each pixel from tar shards, such as skin lesions and their outlines.

Shapes: H W image, h w as it is in a batch, K classes.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.augment.fields import ImageFields
from lightspan.datamodules.image.augment.rendering import NO_LABEL, nearest
from lightspan.datamodules.image.augment.views import Views, seeded
from lightspan.datamodules.image.batch import SegmentedBatch
from lightspan.datamodules.shards.decoders import IMAGES, MASK, decode_fields, place_of
from lightspan.datamodules.shards.stand_ins import NOWHERE, black_png
from lightspan.datamodules.shards.stream import Decoding, Shards


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


class MaskedShards(Shards):
    """Batches of `SegmentedBatch`: each image once in an epoch, with the class of each pixel. Order, resume, ranks and
    damage are those of `Shards`.

    A sample is KEY.jpg (png, webp) and KEY.mask.png of the same size: one channel, grey or with a palette, whose
    numbers are classes. Crop, size, angle and mirror of a view are those of the mask too, in which nothing is blended;
    a pixel without a class is -1 in a batch.

    Args:
        shards: with masks.
        val_shards: likewise, read once in each validation; None means no validation.
        num_classes: K, at least 2.
        ignore_label: number of a pixel without a class in a mask, not one of the classes.
        view: makes the one view of an image in training, such as a `RandomViews` with count=1.
        sides: height and width in pixels to which images without a view are scaled, as those of bank and validation.
        settings: `batch_size`, `mean`, `std`, `window`, `seed`, `num_workers` and the others of `Shards` but `fields`,
            `image_size`, `views`, `views_on` and `hold_out`.
    """

    batch_type: type = SegmentedBatch

    def __init__(
        self,
        shards: list[ReadPath],
        val_shards: list[ReadPath] | None = None,
        num_classes: int = 2,
        ignore_label: int = 255,
        view: Views | None = None,
        sides: tuple[int, int] | None = None,
        **settings: Any,
    ) -> None:
        both = {"image": "|".join(IMAGES), "semantic": MASK}
        super().__init__(
            shards, val_shards, fields=both, image_size=None, views=None, views_on="workers", hold_out=0, **settings
        )
        name = type(self).__name__
        if num_classes < 2 or 0 <= ignore_label < num_classes:
            raise UserError(
                f"{name} num_classes={num_classes} must be at least 2, and ignore_label={ignore_label} none of the "
                f"classes from 0 to {num_classes - 1}"
            )
        if sides is not None and min(sides) < 1:
            raise UserError(f"{name} sides={[*sides]} must be two numbers of pixels of at least 1")
        require_numbers(4 * math.prod(sides or (1, 1)), sides=sides)
        self.require_one_view("view", view)
        self.num_classes = num_classes
        plain = MaskedDecoding(**vars(self.decode), num_classes=num_classes, ignore_label=ignore_label, sides=sides)
        self.decode: MaskedDecoding = replace(plain, image=replace(plain.image, views=view))

    def require_one_view(self, setting: str, view: Views | None) -> None:
        """Raises: UserError for views that a mask cannot follow."""
        if view is not None and (view.drawn is None or len(view.drawn.renderings) != 1):
            raise UserError(
                f"{type(self).__name__} {setting} must make one view from drawn numbers, which the mask follows, and "
                f"not {type(view).__name__}; set a RandomViews with count=1"
            )

    def example(self) -> dict[str, Any]:
        """A black picture, all of class 0."""
        return self.decode(NOWHERE | {"png": black_png(720, 1280), MASK: black_png(720, 1280, channels=1)}, 0)
