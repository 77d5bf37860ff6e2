"""The views in a batch, as a method asks for them."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightspan.distributed import rank
from lightspan.errors import UserError

TWO_VIEWS = "lightspan.datamodules.images.views.TwoViews"


def views_of(batch: Mapping[str, Any], method: str, count: int | None = None) -> list[Tensor]:
    """The views [B C H W] of a batch of images.

    Without `views` in the batch its images are the one view, as the data give them. A method that can train on them
    says so once: contrast without random changes of the images is seldom meant.

    Args:
        method: its name, for messages.
        count: how many views it needs; None takes any number.
    Raises: UserError for another number, or a batch without images.
    """
    views = list(batch["views"]) if "views" in batch else [batch["image"]] if "image" in batch else []
    if len(views) != count if count is not None else not views:
        raise UserError(
            f"{method} needs {count or 'some'} views of each image, and this batch gives {len(views)} (it holds "
            f"{', '.join(sorted(batch))}); set data.init_args.views.class_path={TWO_VIEWS}"
        )
    if "views" not in batch and rank() == 0:
        warnings.warn(
            f"{method} trains on one view of each image, which nothing changes at random; if that is not meant, set "
            f"data.init_args.views.class_path={TWO_VIEWS}",
            stacklevel=2,
        )
    return views


def labelled_views(batch: Mapping[str, Any], method: str) -> list[Tensor]:
    """The views [B C H W] of a batch with labels, for a method that stacks them: all of one size.

    Raises: UserError for views of several sizes, or a batch without labels or images.
    """
    views = views_of(batch, method)
    if "label" not in batch or len({view.shape for view in views}) > 1:
        raise UserError(
            f"{method} needs labels, and views of one size; this batch holds {sorted(batch)} and views of "
            f"{[[*view.shape[2:]] for view in views]}; correct data.init_args.views or take data with classes"
        )
    return views
