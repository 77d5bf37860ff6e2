"""Texts as tokens of one length. Shapes: N texts, T tokens."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightspan.errors import UserError


def require_length(length: int) -> None:
    """Raises: UserError for fewer than three tokens."""
    if length < 3:
        raise UserError(f"length={length} leaves no room for text between two special tokens; it must be 3 or more")


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask), int64 [N, T]: truncated or padded at the end to T = length. Words that look like a special token
    are text.
    """
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=length,
        padding="max_length",
        padding_side="right",
        split_special_tokens=True,
    )
    return tuple(np.asarray(encoded[name], dtype=np.int64) for name in ("input_ids", "attention_mask"))  # type: ignore[return-value]
