"""The tokens of a batch of texts, as methods of language read them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightspan.errors import UserError
from lightspan.nn.labels import known_rows
from lightspan.nn.samples import WHOLE, require_fields, require_rows


def tokens_of(batch: Mapping[str, Any], method: str) -> Tensor:
    """`tokens` of a batch, int64 [B T].

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without a text, from which networks of transformers cannot tell their shapes.
    """
    require_fields(batch, method)
    tokens_BT: Tensor = batch["tokens"]
    if tokens_BT.shape[0] == 0:  # len() would fix the size of the batch in an exported graph
        raise UserError(
            f"{method} needs a text on every rank, and this batch has none; let the loader divide its samples evenly "
            "among the ranks"
        )
    return tokens_BT


def require_denoising(batch: Mapping[str, Any], method: str) -> None:
    """Of the fields that a network reads of a `DenoisingBatch`.

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without them, with fields of other kinds or shapes, or without a row.
    """
    require_fields(batch, method)
    sides = (("inputs", "input_segments"), ("targets", "decoder_inputs", "target_segments"))
    lacking = [name for side in sides for name in side if name not in batch]
    if lacking:
        raise UserError(
            f"{method} reads corrupted texts, and this batch has no {', '.join(lacking)} (it holds "
            f"{', '.join(sorted(batch))}); give the data module the form "
            "lightspan.datamodules.text.denoising.Denoising"
        )
    for first, *others in sides:
        for name in (first, *others):
            field, shape = batch[name], batch[first].shape
            if not isinstance(field, Tensor) or field.dtype not in WHOLE or field.ndim != 2 or field.shape != shape:
                kind = f"{field.dtype} {list(field.shape)}" if isinstance(field, Tensor) else type(field).__name__
                raise UserError(f"{method} reads {name} as int64 [B, T], like {first}, and this batch has {kind}")
    if batch["inputs"].shape[0] != batch["targets"].shape[0] or batch["inputs"].shape[0] == 0:
        raise UserError(
            f"{method} needs a text on every rank, with an input and a target, and this batch has "
            f"{batch['inputs'].shape[0]} and {batch['targets'].shape[0]}; let the loader divide its samples evenly "
            "among the ranks"
        )


def captions_of(batch: Mapping[str, Any], method: str) -> tuple[Tensor, Tensor, Tensor]:
    """`tokens` and `mask` of a batch, int64 [B T], and which samples have a text, bool [B], by its `caption_known`.

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without captions, or with captions of another kind or shape.
    """
    require_fields(batch, method)
    if "tokens" not in batch or "mask" not in batch:
        raise UserError(
            f"{method} needs captions, as tokens and mask, and this batch has none (it holds "
            f"{', '.join(sorted(batch))}); give the data a tokenizer, or take data with captions"
        )
    tokens_BT, mask_BT = fields = batch["tokens"], batch["mask"]
    kinds = [f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}" for x in fields]
    tensors = all(isinstance(x, Tensor) and x.ndim == 2 and not x.is_floating_point() for x in fields)
    if not tensors or tokens_BT.dtype not in WHOLE or tokens_BT.shape != mask_BT.shape or not tokens_BT.shape[1]:
        raise UserError(
            f"{method} reads captions as tokens and mask, int64 [B, T] of at least one token, and this batch gives "
            f"{' and '.join(kinds)}; let the tokenizer give both"
        )
    require_rows(batch, "tokens", method)
    return tokens_BT, mask_BT, known_rows(batch, "caption_known", tokens_BT)
