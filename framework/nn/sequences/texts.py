"""The tokens of a batch of texts, as methods of language read them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightspan.errors import UserError
from lightspan.nn.labels import known_rows


def tokens_of(batch: Mapping[str, Any], method: str) -> Tensor:
    """`tokens` of a batch, int64 [B T].

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without a text, from which networks of transformers cannot tell their shapes.
    """
    tokens_BT: Tensor = batch["tokens"]
    if tokens_BT.shape[0] == 0:  # len() would fix the size of the batch in an exported graph
        raise UserError(
            f"{method} needs a text on every rank, and this batch has none; let the loader divide its samples evenly "
            "among the ranks"
        )
    return tokens_BT


def captions_of(batch: Mapping[str, Any], method: str) -> tuple[Tensor, Tensor, Tensor]:
    """`tokens` and `mask` of a batch, int64 [B T], and which samples have a text, bool [B], by its `caption_known`.

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without captions.
    """
    if "tokens" not in batch or "mask" not in batch:
        raise UserError(
            f"{method} needs captions, as tokens and mask, and this batch has none (it holds "
            f"{', '.join(sorted(batch))}); give the data a tokenizer, or take data with captions"
        )
    return batch["tokens"], batch["mask"], known_rows(batch, "caption_known", batch["tokens"])
