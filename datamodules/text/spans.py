"""Which tokens of a text are to be guessed: spans at random places, or its end.

Source: the random partitions of T5 (Raffel et al., 2019, arXiv 1910.10683; `random_spans_noise_mask` of the authors'
code), with the settings of UL2 (Tay et al., 2022, arXiv 2205.05131, section 3.1). Shapes: L tokens of a text.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightspan.core.errors import UserError

Mode = Literal["R", "S", "X"]
SHORTEST = 2
"""Tokens of a text of which one is hidden and one seen."""


def partition(total: int, parts: int, generator: np.random.Generator) -> np.ndarray:
    """`parts` positive whole numbers that sum to `total`, all such sequences equally likely, int64 [parts]."""
    begins = np.arange(total - 1) < parts - 1
    generator.shuffle(begins)
    starts = np.flatnonzero(np.concatenate([[True], begins]))
    return np.diff(starts, append=total)


class Denoiser(ABC):
    """A way to hide a part of a text.

    Attributes:
        mode: of the token that tells a network which it is: R regular, S sequential, X extreme.
        name: in logs.
    """

    mode: Mode
    name: str

    @abstractmethod
    def hidden(self, length: int, generator: np.random.Generator) -> np.ndarray:
        """bool [L], of a text of L >= 2 tokens; the first is never hidden and the last always."""

    @abstractmethod
    def most(self, length: int) -> tuple[int, int, int]:
        """(tokens seen, tokens hidden, spans): the most of each for a text of L tokens."""


@dataclass(frozen=True)
class Spans(Denoiser):
    """Spans of about `mean` tokens, which together are a share `rate` of the text.

    round(L rate) tokens are hidden, at least 1 and at most L - 1, in round(hidden / mean) spans, at least 1. Both the
    hidden and the seen tokens are divided by a random partition, so there are no more spans than seen tokens: at a high
    rate, spans of few tokens become longer.

    Args:
        mean: at least 1.
        rate: in (0, 1).
        mode: as in `Denoiser`.
    """

    mean: float = 3.0
    rate: float = 0.15
    mode: Mode = "R"

    def __post_init__(self) -> None:
        if not self.mean >= 1 or not 0 < self.rate < 1:
            raise UserError(f"Spans mean={self.mean} must be at least 1, and rate={self.rate} in (0, 1)")
        _require_mode(self)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.mode}{self.mean:g}_{100 * self.rate:g}"

    def counts(self, length: int) -> tuple[int, int]:
        """(hidden tokens, spans) of a text of L tokens."""
        hidden = min(max(round(length * self.rate), 1), length - 1)
        return hidden, min(max(round(hidden / self.mean), 1), length - hidden)

    def hidden(self, length: int, generator: np.random.Generator) -> np.ndarray:
        hidden, spans = self.counts(length)
        sizes_of_hidden = partition(hidden, spans, generator)
        sizes_of_seen = partition(length - hidden, spans, generator)
        sizes = np.stack([sizes_of_seen, sizes_of_hidden], axis=1).ravel()
        return np.repeat(np.tile([False, True], spans), sizes)

    def most(self, length: int) -> tuple[int, int, int]:
        hidden, spans = self.counts(length)
        return length - hidden, hidden, spans


@dataclass(frozen=True)
class Ending(Denoiser):
    """The end of the text, in one span: a prefix language model.

    How long it is is drawn evenly from 1 to 2 L rate - 1, so that its mean is L rate. (The paper says that the point is
    random and that a quarter is hidden on average; the distribution is assumed.)

    Args:
        rate: mean share of the text, in (0, 0.5].
        mode: as in `Denoiser`.
    """

    rate: float = 0.25
    mode: Mode = "S"

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 0.5:
            raise UserError(f"Ending rate={self.rate} is outside (0, 0.5]; it is the mean share of a text")
        _require_mode(self)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.mode}_{100 * self.rate:g}"

    def longest(self, length: int) -> int:
        return min(max(round(2 * length * self.rate) - 1, 1), length - 1)

    def hidden(self, length: int, generator: np.random.Generator) -> np.ndarray:
        return np.arange(length) >= length - int(generator.integers(1, self.longest(length) + 1))

    def most(self, length: int) -> tuple[int, int, int]:
        return length - 1, self.longest(length), 1


def _require_mode(denoiser: Denoiser) -> None:
    if denoiser.mode not in ("R", "S", "X"):
        raise UserError(f"{type(denoiser).__name__} mode={denoiser.mode!r} must be R, S or X")


MIXTURE: tuple[Denoiser, ...] = (
    Spans(3, 0.15, "R"),
    Spans(8, 0.15, "R"),
    Ending(0.25, "S"),
    Spans(3, 0.5, "X"),
    Spans(8, 0.5, "X"),
    Spans(64, 0.15, "X"),
    Spans(64, 0.5, "X"),
)
"""UL2's seven."""
