"""Which words of a text are hidden: any, those that tell its label, or those that do not.

Source: Uppaal et al., 2024, arXiv 2401.17514: words ranked by their pointwise mutual information with the label, which
is estimated on labelled texts of the source domain alone. Shapes: L words of a text.
"""

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lightspan.core.errors import UserError

_BORDER = re.compile(r"^\W+|\W+$")


def plain_word(word: str) -> str:
    """In lower case, without signs around it."""
    return _BORDER.sub("", word.lower())


def label_information(texts: Sequence[Sequence[str]], labels: Sequence[int], fewest: int = 3) -> dict[str, float]:
    """Of each word the largest over labels of PMI(w, y) = log p(w, y) / (p(w) p(y)), in nats, at least 0.

    Probabilities are shares of texts; a text has a word once.

    Args:
        texts: as plain words.
        fewest: texts that a word must be in; rarer ones are left out, since one text makes any word tell all.
    """
    with_word, with_both, with_label = Counter[str](), Counter[tuple[str, int]](), Counter(labels)
    for words, label in zip(texts, labels, strict=True):
        for word in set(words):
            with_word[word] += 1
            with_both[word, label] += 1
    return {
        word: max(
            math.log(with_both[word, label] * len(labels) / (count * of_label))
            for label, of_label in with_label.items()
            if with_both[word, label]
        )
        for word, count in with_word.items()
        if count >= fewest
    }


class WordChoice(ABC):
    """Hides round(rate L) words of a text, one at least: equally many of the same text, whichever they are.

    Args:
        rate: in (0, 1).
    """

    def __init__(self, rate: float = 0.15) -> None:
        if not 0 < rate < 1:
            raise UserError(f"{type(self).__name__} rate={rate} must lie in (0, 1)")
        self.rate = rate

    @abstractmethod
    def learn(self, texts: Sequence[Sequence[str]], labels: Sequence[int]) -> None:
        """Told the labelled texts of the source domain before the first text is hidden."""

    def places(self, words: Sequence[str], generator: np.random.Generator) -> np.ndarray:
        """Places of the hidden words in a text of at least one, int64, in order."""
        return np.sort(self.ranked(words, generator.permutation(len(words)))[: self.count(len(words))])

    def count(self, words: int) -> int:
        """How many are hidden of so many."""
        return max(1, round(self.rate * words))

    @abstractmethod
    def ranked(self, words: Sequence[str], shuffled: np.ndarray) -> np.ndarray:
        """All places, those first that are to be hidden first. Args: shuffled: all places in random order."""


class RandomWords(WordChoice):
    """Any words."""

    def learn(self, texts: Sequence[Sequence[str]], labels: Sequence[int]) -> None:
        """Labels say nothing here."""

    def ranked(self, words: Sequence[str], shuffled: np.ndarray) -> np.ndarray:
        return shuffled


class InformativeWords(WordChoice):
    """Those that tell most of the label. Words of which nothing is known, such as those that only the target domain
    has, come last; equals are in random order.

    Raises: UserError where no labelled texts were told.
    """

    sign = -1.0

    def __init__(self, rate: float = 0.15) -> None:
        super().__init__(rate)
        self.information: dict[str, float] | None = None

    def learn(self, texts: Sequence[Sequence[str]], labels: Sequence[int]) -> None:
        self.information = label_information(texts, labels)

    def ranked(self, words: Sequence[str], shuffled: np.ndarray) -> np.ndarray:
        if self.information is None:
            raise UserError(f"{type(self).__name__} got no labelled texts of the source domain")
        known = [self.information.get(plain_word(word)) for word in words]
        score = np.asarray([np.inf if one is None else self.sign * one for one in known])
        return shuffled[np.argsort(score[shuffled], kind="stable")]


class UninformativeWords(InformativeWords):
    """Those that tell least of the label; unknown words come last here too."""

    sign = 1.0
