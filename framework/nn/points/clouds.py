"""Reads the points of a batch, packed: those of all clouds, one after another, cut by offsets.

Shapes: N points of all clouds, B clouds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightspan.core.batches import OFFSETS, range_on_host, require_fields
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
    if ends is not None and (ends != (0, len(xyz)) or int(offsets.diff().clamp_max(0).sum())):
        raise UserError(
            f"{method}: offsets of this batch must ascend from 0 to its {len(xyz)} points, and are "
            f"{offsets[:8].tolist()}"
        )
    return xyz, offsets


def point_fields_of(batch: Mapping[str, Any], names: Sequence[str], points: int, method: str) -> list[Tensor]:
    """What a batch has of its points besides coordinates, [N 3] each, in the order of the names.

    Args:
        points: N.
        method: its name, for messages.
    Raises: UserError for a field that is missing, or is not of the points.
    """
    given = [batch.get(name) for name in names]
    for name, field in zip(names, given, strict=True):
        if not isinstance(field, Tensor) or not field.is_floating_point() or field.shape != (points, 3):
            raise UserError(
                f"{method} reads {name} of points, floats [{points}, 3], and this batch has {_shown(field)}; set "
                "data.init_args.fields to give it, or leave it out of the backbone's fields"
            )
    return given  # type: ignore[return-value]


def _shown(value: Any) -> str:
    return f"{value.dtype} {[*value.shape]}" if isinstance(value, Tensor) else type(value).__name__


def _require_samples(batch: Mapping[str, Any], clouds: int, method: str) -> None:
    rows = batch.get("index")
    if isinstance(rows, Tensor) and rows.ndim and len(rows) != clouds:
        raise UserError(
            f"{method}: index of this batch has {len(rows)} rows, and offsets cut {clouds} clouds; let the dataset "
            "give a number for each"
        )
