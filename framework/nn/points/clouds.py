"""Point clouds of any numbers of points, packed: the rows of all clouds, one after another, cut by offsets.

Shapes: N rows of all clouds, B clouds, D numbers of a row, M rows of the largest cloud.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightspan.core.batches import OFFSETS, range_on_host, require_fields
from lightspan.core.devices import has_values
from lightspan.core.errors import UserError


def points_of(batch: Any, method: str) -> tuple[Tensor, Tensor]:
    """The coordinates [N 3] of a batch's points and the offsets, int64 [B+1], by which they are cut.

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without these, or with others.
    """
    require_fields(batch, method)
    xyz, offsets = batch.get("xyz"), batch.get(OFFSETS)
    points = isinstance(xyz, Tensor) and xyz.is_floating_point() and xyz.ndim == 2 and xyz.shape[1] == 3
    cut = isinstance(offsets, Tensor) and offsets.ndim == 1 and offsets.dtype == torch.int64 and len(offsets) > 0
    if not (points and cut):
        raise UserError(
            f"{method} reads points as xyz, floats [N, 3], and offsets, int64 [B + 1], and this batch has xyz "
            f"{_shown(xyz)} and offsets {_shown(offsets)}; take data whose batches are a PointsBatch "
            "(lightspan.datamodules.points.batch)"
        )
    _require_samples(batch, len(offsets) - 1, method)
    ends = range_on_host(offsets)
    if ends is not None and (ends != (0, len(xyz)) or int(offsets.diff().clamp_max(0).sum())):  # type: ignore[arg-type]
        raise UserError(
            f"{method}: offsets of this batch must ascend from 0 to its {len(xyz)} points, and are "  # type: ignore[arg-type]
            f"{offsets[:8].tolist()}"  # type: ignore[index]
        )
    return xyz, offsets  # type: ignore[return-value]


def _shown(value: Any) -> str:
    return f"{value.dtype} {[*value.shape]}" if isinstance(value, Tensor) else type(value).__name__


def _require_samples(batch: Mapping[str, Any], clouds: int, method: str) -> None:
    rows = batch.get("index")
    if isinstance(rows, Tensor) and rows.ndim and len(rows) != clouds:
        raise UserError(
            f"{method}: index of this batch has {len(rows)} rows, and offsets cut {clouds} clouds; let the dataset "
            "give a number for each"
        )


def cloud_of(offsets: Tensor, rows: int) -> Tensor:
    """The number of the cloud to which each of `rows` packed rows belongs, int64 [N], without waiting for a device."""
    return torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff(), output_size=rows)


def cloud_means(x_ND: Tensor, offsets: Tensor) -> Tensor:
    """The mean over the rows of each cloud, [B D] in the type of x; 0, with gradient 0, of an empty one."""
    sums_BD = x_ND.new_zeros(len(offsets) - 1, x_ND.shape[1]).index_add(0, cloud_of(offsets, len(x_ND)), x_ND)
    return sums_BD / offsets.diff().clamp_min(1)[:, None].to(x_ND.dtype)


def cloud_maxima(x_ND: Tensor, offsets: Tensor) -> Tensor:
    """The largest of each column over the rows of each cloud, [B D] in the type of x; 0, with gradient 0, of an empty
    one. Rows that are equally large share the gradient.
    """
    empty_BD = x_ND.new_zeros(len(offsets) - 1, x_ND.shape[1])
    at_ND = cloud_of(offsets, len(x_ND))[:, None].expand_as(x_ND)
    return empty_BD.scatter_reduce(0, at_ND, x_ND, "amax", include_self=False)


def padded(x_ND: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """[B M D], each cloud's rows and then zeros, and which rows are a cloud's, bool [B M]. M is at least 1.

    M is read on the host, for which the device is waited for.
    """
    counts_B = offsets.diff()
    if has_values(counts_B):
        most = max(int(counts_B.max()), 1) if len(counts_B) else 1
    else:  # a plan, whose clouds are of one size
        most = max(-(-len(x_ND) // max(len(counts_B), 1)), 1)
    real_BM = torch.arange(most, device=x_ND.device) < counts_B[:, None]
    x_BMD = x_ND.new_zeros(len(counts_B), most, *x_ND.shape[1:])
    cloud_N = cloud_of(offsets, len(x_ND))
    place_N = torch.arange(len(x_ND), device=x_ND.device) - offsets[cloud_N]
    return x_BMD.index_put((cloud_N, place_N), x_ND), real_BM
