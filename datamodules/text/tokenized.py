"""Texts as tokens of one length. Shapes: N texts, T tokens."""

from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.core.tokenizing import cut

AT_ONCE = 2**20
"""Characters of the texts that are cut at once, unless one has more: each takes about 300 bytes meanwhile."""


def require_length(length: int, name: str = "length") -> None:
    """Raises: UserError for fewer than three tokens, and for more than a sample may have.

    Args:
        name: of the setting.
    """
    if length < 3:
        raise UserError(f"{name}={length} leaves no room for text between two special tokens; it must be 3 or more")
    require_numbers(length, **{name: length})


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask), int64 [N, T]: truncated or padded at the end to T = length. Words that look like a special token
    are text.
    """
    encoded = _encoded(tokenizer, length, list(texts))
    return encoded["input_ids"], encoded["attention_mask"]


def tokenized_pairs(
    tokenizer: PreTrainedTokenizerBase, firsts: Sequence[str], seconds: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, mask, types) of two texts a row, as `tokenized`; the longer one is cut first. Types are 1 on the second
    where the tokenizer tells them apart, 0 elsewhere.
    """
    encoded = _encoded(tokenizer, length, list(firsts), list(seconds))
    tokens = encoded["input_ids"]
    return tokens, encoded["attention_mask"], encoded.get("token_type_ids", np.zeros_like(tokens))


def _encoded(tokenizer: PreTrainedTokenizerBase, length: int, *texts: list[str]) -> dict[str, np.ndarray]:
    """Raises: UserError for a tokenizer that puts as many special tokens around a text as there is room for."""
    if (special := tokenizer.num_special_tokens_to_add(pair=len(texts) > 1)) >= length:
        raise UserError(f"length={length} leaves no room beside the {special} special tokens of a text")
    encoded = [
        cut(
            tokenizer,
            *(column[some] for column in texts),
            truncation=True,
            max_length=length,
            padding="max_length",
            padding_side="right",
            split_special_tokens=True,
        )
        for some in _pieces(texts)
    ]
    return {name: np.concatenate([np.asarray(each[name], dtype=np.int64) for each in encoded]) for name in encoded[0]}


def _pieces(texts: Sequence[list[str]]) -> Iterator[slice]:
    """Rows that are cut at once, in their order."""
    begin = characters = 0
    for row, own in enumerate(zip(*texts, strict=True)):
        characters += (size := sum(map(len, own)))
        if characters > AT_ONCE and row > begin:
            yield slice(begin, row)
            begin, characters = row, size
    yield slice(begin, None)
