"""What a network reads of a batch, or the views of it, as a method asks for them."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightspan.core.batches import VIEWS, read_names, require_fields
from lightspan.core.distributed import rank
from lightspan.core.errors import UserError
from lightspan.nn.labels import labels_of

RANDOM_VIEWS = "lightspan.datamodules.image.augment.views.RandomViews"
TWO_VIEWS = "lightspan.datamodules.image.augment.views.TwoViews"
MULTI_CROP = "lightspan.datamodules.image.augment.views.MultiCrop"


def views_of(batch: Mapping[str, Any], method: str, count: int | None = None) -> list[Tensor]:
    """The views [B ...] of a batch.

    Without `views` in the batch the one view is what a network reads of it, such as its images, as the data give them.
    A method that trains on images like that says so once, since contrast without random changes of them is seldom
    meant; clips and crops of volumes are at random places as it is.

    Args:
        method: its name, for messages.
        count: how many views it needs; None takes any number.
    Raises: UserError for another number, for views of different images or of whole numbers, or a batch without images
        or without named fields.
    """
    require_fields(batch, method)
    views = list(batch[VIEWS]) if VIEWS in batch else [batch[name] for name in read_names(batch)[:1]]
    if len(views) != count if count is not None else not views:
        raise UserError(
            f"{method} needs {count or 'some'} view{'' if count == 1 else 's'} of each {_shown(batch)}, and this batch "
            f"gives {len(views)} (it holds {', '.join(sorted(batch))}); set {_way_out(batch, count or 2)}"
        )
    if VIEWS not in batch and _shown(batch) == "image" and rank() == 0:
        kind = f"{RANDOM_VIEWS} and data.init_args.views.init_args.count=1" if count == 1 else TWO_VIEWS
        warnings.warn(
            f"{method} trains on one view of each image, which nothing changes at random; if that is not meant, set "
            f"data.init_args.views.class_path={kind}",
            stacklevel=2,
        )
    return pictures(views, method)


def _shown(batch: Mapping[str, Any]) -> str:
    """What the samples of a batch are, by a field that only batches of such have."""
    return next((name for field, name in (("fps", "video"), ("spacing", "volume")) if field in batch), "image")


def _way_out(batch: Mapping[str, Any], count: int) -> str:
    """The settings by which data give `count` views of each sample."""
    if (shown := _shown(batch)) == "video":
        return f"data.init_args.clips={count} and data.init_args.speeds=[1]"
    if shown == "volume":
        return f"data.init_args.crops={count} and data.init_args.bases=null"
    return "data.init_args.views=null" if count == 1 else f"data.init_args.views.class_path={TWO_VIEWS}"


def pictures(views: Iterable[Any], method: str) -> list[Tensor]:
    """The views. Raises: UserError for views that are not floating-point, or not of the same images."""
    views = list(views)
    wrong = [view for view in views if not isinstance(view, Tensor) or not view.is_floating_point()]
    if wrong:
        found = str(wrong[0].dtype) if isinstance(wrong[0], Tensor) else f"a {type(wrong[0]).__name__}"
        raise UserError(
            f"{method} reads images as floating-point tensors, and this batch gives {found}; let the dataset give "
            "float32, standardised as lightspan.datamodules.image.batch says of an ImageBatch"
        )
    # Compared and not gathered in a set, which would fix the size of a batch that is traced for export.
    if any(len(view) != len(views[0]) for view in views[1:]):
        raise UserError(
            f"{method} needs every view of each image, and the views of this batch are of {[len(v) for v in views]} "
            "images; let the dataset give each sample as many views"
        )
    return views


def image_of(batch: Any, method: str) -> Tensor:
    """What a network reads of a batch, such as images, [B C H W], or rows of a table, [B F], or the one view of each,
    for a method that trains on them as they are.

    Raises: UserError for more than one view, and as `views_of`.
    """
    require_fields(batch, method)
    name = next(iter(read_names(batch)), VIEWS)
    return (views_of(batch, method, 1) if name == VIEWS else pictures([batch[name]], method))[0]


def labelled_views(batch: Mapping[str, Any], method: str) -> tuple[list[Tensor], Tensor]:
    """The views [B C H W] and the labels [B] of a batch, for a method that stacks the views: all of one size.

    Raises: UserError for views of several sizes, or a batch without images or without one label for each.
    """
    views = views_of(batch, method)
    require_one_size(views, method)
    return views, labels_of(batch, method, len(views[0]))


def require_one_size(views: Sequence[Tensor], method: str) -> None:
    """Raises: UserError for views of several sizes, which do not stack."""
    if len({view.shape for view in views}) > 1:
        raise UserError(
            f"{method} needs views of one size, and this batch has views of {[[*view.shape[1:]] for view in views]}; "
            "correct data.init_args.views"
        )


def global_first(batch: Mapping[str, Any], method: str, global_views: int) -> list[Tensor]:
    """The views [B C h w] of a batch, the first `global_views` of one size: crops of most of an image, from which the
    targets come.

    Args:
        method: its name, for messages.
    Raises: UserError for other views, or a batch without any or without named fields.
    """
    require_fields(batch, method)
    views = pictures(batch.get("views", ()), method)
    if len(views) < global_views or len({view.shape for view in views[:global_views]}) > 1:
        raise UserError(
            f"{method} needs views of which the first global_views={global_views} are of one size, and the batch "
            f"has views of {[[*view.shape[2:]] for view in views] or 'no kind'}; set data.init_args.views to a "
            f"MultiCrop ({MULTI_CROP}) with the global views first"
        )
    return views


def require_global_views(count: int) -> None:
    """Raises: UserError for fewer than two: each needs another one from which to take its target."""
    if count < 2:
        raise UserError(f"global_views={count} leaves a global view without another one; it must be 2 or more")


def require_domains(batch: Any, method: str) -> None:
    """Raises: UserError for a batch that is no `lightspan.datamodules.image.batch.DomainsBatch`: without images of both
    domains or without a class for each pixel of the first.

    Args:
        method: its name, for messages.
    """
    require_fields(batch, method)
    lacking = [name for name in ("image", "semantic", "target_image", "index") if name not in batch]
    if lacking:
        raise UserError(
            f"{method} needs {', '.join(lacking)} in a batch, and this one holds {', '.join(sorted(batch))}; take data "
            "of two domains, whose batches are a DomainsBatch (lightspan.datamodules.image.batch)"
        )
    (image, target), label = pictures((batch["image"], batch["target_image"]), method), batch["semantic"]
    if label.shape != (len(image), *image.shape[2:]) or label.is_floating_point() or image.shape != target.shape:
        raise UserError(
            f"{method} needs a whole number for each pixel and images of both domains of one size, and this batch has "
            f"image {[*image.shape]}, semantic {label.dtype} {[*label.shape]} and target_image {[*target.shape]}"
        )
