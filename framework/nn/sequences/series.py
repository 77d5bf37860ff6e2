"""A batch's sequences of values or symbols, as methods read them.

Shapes: B sequences, L steps, C numbers of a step.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightspan.core.batches import WHOLE, described, require_fields
from lightspan.core.errors import UserError


def require_series(backbone: nn.Module, method: str) -> None:
    """Raises: UserError for a network that does not read sequences as those of `lightspan.backbones.sequence` do."""
    needed = ("channels", "vocab_size", "num_features", "causal", "embed", "encode")
    if lacking := [name for name in needed if not hasattr(backbone, name)]:
        raise UserError(
            f"{method} needs a network for sequences, and {type(backbone).__name__} has no {', '.join(lacking)}; use "
            "one of lightspan.backbones.sequence"
        )


def series_in(batch: Mapping[str, Any], backbone: nn.Module, method: str) -> tuple[Tensor, Tensor | None]:
    """What the network reads: values as `sequence`, [B L C] in the type of its weights, and None; or symbols as
    `tokens`, int64 [B L], and which of them are a sequence's own by `mask`, bool [B L], None where the batch has none.

    Args:
        backbone: see `require_series`.
        method: its name, for messages.
    Raises: UserError for a batch without them, or with such of another kind, shape or number of rows.
    """
    require_fields(batch, method)
    symbols = backbone.vocab_size is not None
    field = "tokens" if symbols else "sequence"
    if field not in batch:
        raise UserError(
            f"{method}: its network reads {'symbols as tokens' if symbols else 'values as sequence'}, and this batch "
            f"holds {', '.join(sorted(batch))}; set {'channels' if symbols else 'vocab_size'} of the network, or take "
            "other data"
        )
    x, mask_BL = batch[field], batch.get("mask") if symbols else None
    kind = isinstance(x, Tensor) and (
        x.ndim == 2 and x.dtype in WHOLE if symbols else x.ndim == 3 and x.is_floating_point()
    )
    if not kind or (not symbols and x.shape[2] != backbone.channels):
        found = described(x)
        expected = "int64 [B, L]" if symbols else f"float [B, L, {backbone.channels}]"
        raise UserError(
            f"{method} reads {field} as {expected}, and this batch gives {found}; change the data or the network"
        )
    if mask_BL is not None and (not isinstance(mask_BL, Tensor) or mask_BL.shape != x.shape):
        raise UserError(f"{method}: mask of this batch must have a 0 or 1 for each token; let the data give both")
    if not symbols:  # float64 is what NumPy gives
        x = x.to(next((weight.dtype for weight in backbone.parameters()), x.dtype))
    return x, None if mask_BL is None else mask_BL != 0
