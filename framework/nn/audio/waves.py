"""The recordings in a batch, as a method reads them. Shapes: B recordings, S samples."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightspan.core.batches import WHOLE, require_fields, require_rows
from lightspan.core.errors import UserError


def waves_of(batch: Mapping[str, Any], owner: object) -> tuple[Tensor, Tensor]:
    """(wave [B S], length int [B]) of a batch; see `lightspan.datamodules.audio.batch.AudioBatch`.

    Raises: UserError for a batch without them, or with ones of another kind or shape.
    """
    method = type(owner).__name__
    require_fields(batch, method)
    wave_BS, length_B = batch.get("wave"), batch.get("length")
    right = (
        isinstance(wave_BS, Tensor)
        and wave_BS.is_floating_point()
        and wave_BS.ndim == 2
        and isinstance(length_B, Tensor)
        and length_B.ndim == 1
        and length_B.dtype in WHOLE
    )
    if not right:
        found = ", ".join(
            f"{name} {value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else name
            for name, value in sorted(batch.items())
        )
        raise UserError(
            f"{method} reads recordings, wave float [B, S] with length int64 [B], and this batch holds {found}; take "
            "data of sound, such as lightspan.datamodules.audio.folder.AudioFolder"
        )
    assert isinstance(wave_BS, Tensor)
    assert isinstance(length_B, Tensor)
    require_rows(batch, "length", method)
    return wave_BS, length_B
