"""Base crops, on a grid over a volume, and crops at random places of it, as a batch brings them.

Shapes: B volumes of this rank, K base crops, M crops at random places.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightspan.core.batches import described
from lightspan.core.errors import UserError
from lightspan.nn.views import require_one_size, views_of


def base_crops_of(batch: Mapping[str, Any], method: str) -> tuple[Tensor, Tensor]:
    """All crops, the base crops first and those of one place together, [(K+M) B ...], and the share of each of the
    others that lies in each base crop, float [B M K] (`lightspan.datamodules.volume.batch.VolumeViewsBatch`).

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without `overlap`, or one that does not fit its views, and for views of several
        sizes.
    """
    views = views_of(batch, method)
    overlap_BMK = batch.get("overlap")
    if (
        not isinstance(overlap_BMK, Tensor)
        or not overlap_BMK.is_floating_point()
        or overlap_BMK.ndim != 3
        or len(overlap_BMK) != len(views[0])
        or sum(overlap_BMK.shape[1:]) != len(views)
        or 0 in overlap_BMK.shape[1:]
    ):
        found = "none" if overlap_BMK is None else described(overlap_BMK)
        raise UserError(
            f"{method} needs base crops and crops of {len(views[0])} volumes as views, {len(views)} of them here, and "
            f"overlap, float [B M K], for M of these and K base crops; this batch gives {found}; set "
            "data.init_args.bases, such as [1, 3, 3], and data.init_args.crops"
        )
    require_one_size(views, method)
    return torch.cat(views), overlap_BMK


def by_volume(rows_ND: Tensor, overlap_BMK: Tensor) -> tuple[Tensor, Tensor]:
    """What a network says of the crops of `base_crops_of`: of the base crops, [B K D], and of the others, [B M D]."""
    volumes, crops, bases = overlap_BMK.shape
    rows_BVD = rows_ND.unflatten(0, (bases + crops, volumes)).transpose(0, 1)
    return rows_BVD[:, :bases], rows_BVD[:, bases:]
