"""What a piece of a document becomes in a batch. Shapes: T tokens of a row, n of a piece."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.text.batch import DocumentBatch
from lightspan.datamodules.text.documents import TextTokens


class TextForm(ABC):
    """Makes the fields of a sample from a piece of a document, a function of piece and seed.

    Attributes:
        longest, shortest: tokens of a piece. Documents are cut into pieces of at most `longest`; a document of fewer
            than `shortest` is left out.
        batch_type: of the batches, `index` included.
    """

    batch_type: type | None = None
    longest: int
    shortest: int = 1

    def prepare(self, text_tokens: int, free: frozenset[int] = frozenset()) -> int:
        """Told, before the first sample, how many numbers a tokenizer has, and which of them no text has; says how many
        it needs with its own. Raises: UserError if one of its own may be in a text.
        """
        return text_tokens

    @abstractmethod
    def __call__(self, piece: TextTokens, seed: int) -> dict[str, Tensor]:
        """Of a piece of `shortest` to `longest` tokens."""

    def joined(self, batch: Any) -> Any:
        """A batch for training, on the host; rows may become fewer."""
        return batch


class Padded(TextForm):
    """The piece itself, padded with 0 at its end: samples of `DocumentBatch`. Nothing is random.

    Args:
        length: T, at least 1.
    """

    batch_type = DocumentBatch

    def __init__(self, length: int = 256) -> None:
        if length < 1:
            raise UserError(f"Padded length={length} must be at least 1 token")
        require_numbers(length, length=length)
        self.longest = length

    def __call__(self, piece: TextTokens, seed: int) -> dict[str, Tensor]:
        return {
            "tokens": padded(piece.tokens, self.longest),
            "mask": padded(np.ones(len(piece.tokens)), self.longest),
            "token_bytes": padded(piece.byte_counts, self.longest),
        }


def padded(values: np.ndarray, length: int, value: int = 0) -> Tensor:
    """int64 [length], with `value` behind the values."""
    return F.pad(torch.from_numpy(values.astype(np.int64)), (0, length - len(values)), value=value)


def window(document: TextTokens, longest: int, seed: int, stream: int = 0) -> TextTokens:
    """A document, or if it is longer so many tokens of it, from a place that is drawn from seed and stream."""
    surplus = len(document.tokens) - longest
    if surplus <= 0:
        return document
    start = int(np.random.default_rng((seed, stream)).integers(surplus + 1))
    return TextTokens(*(column[start : start + longest] for column in document))


def joined_in_training(data: LightningDataModule, joined: Callable[[Any], Any], batch: Any) -> Any:
    """What `joined` makes of a batch that a trainer trains on; any other batch keeps its rows."""
    trainer = data.trainer
    return joined(batch) if trainer is not None and trainer.training else batch
