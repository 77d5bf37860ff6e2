"""Masks of whole words, one inside the other, as functions of seed, step and text.

Source: the whole-word masks of BERT's code, and their nested form in the code of Starbucks (Zhuang et al., 2024, arXiv
2410.13230, section 3.2; RetroMAE, Xiao et al., 2022, arXiv 2205.12035, has two that are independent).
Shapes: B texts, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightspan.core.errors import UserError

KEPT, RANDOM = 0.1, 0.1
"""Shares of masked tokens that are left as they are, and that become any word, as in BERT; all others are hidden."""


@dataclass(frozen=True)
class NestedWordMasks:
    """Words are gone through in random order. Each goes into the larger mask if it fits there, and into the smaller one
    too as long as it fits into both: the smaller is inside the larger, and neither hides more tokens than its share.

    Args:
        inner, outer: shares of a text's tokens, special ones included, in (0, 1), inner <= outer; rounded, and one
            token at least.
        seed: >= 0.
    """

    inner: float = 0.2
    outer: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.inner <= self.outer < 1 and self.seed >= 0):
            raise UserError(
                f"NestedWordMasks inner={self.inner} and outer={self.outer} must lie in (0, 1), inner at most as large "
                f"as outer, and seed={self.seed} be at least 0"
            )

    def draw(self, word_BT: np.ndarray, step: int, indices: Sequence[int]) -> np.ndarray:
        """(inner, outer), bool [2 B T], True where a token is masked.

        Args:
            word_BT: the number of the word that a token is part of; below 0 for special tokens and padding, which are
                never masked. Tokens of a word stand side by side.
            indices: the texts' numbers in their dataset.
        """
        masks = np.zeros((2, *word_BT.shape), dtype=bool)
        for row, (word_T, index) in enumerate(zip(word_BT, indices, strict=True)):
            words, sizes = np.unique(word_T[word_T >= 0], return_counts=True)
            tokens = sizes.sum() + 2  # the two special ones, as the authors count
            room = [max(1, round(tokens * share)) for share in (self.inner, self.outer)]
            for place in np.random.default_rng((self.seed, step, index, 0)).permutation(len(words)):
                if not (fits := sizes[place] <= room[1]):
                    continue
                both = sizes[place] <= room[0]
                for mask_T, taken in zip(masks[:, row], (both, fits), strict=True):
                    mask_T |= taken & (word_T == words[place])
                room = [room[0] - sizes[place] * both, room[1] - sizes[place]]
                if room[1] == 0:
                    break
        return masks

    def hide(
        self, tokens_BT: np.ndarray, mask_BT: np.ndarray, hidden: int, words: int, step: int, indices: Sequence[int],
        stream: int,
    ) -> np.ndarray:  # fmt: skip
        """The tokens with those of the mask replaced: eight of ten by `hidden`, one by any of `words`, one by itself.

        Args:
            stream: tells several masks of one text apart, from 1.
        """
        replaced_BT = tokens_BT.copy()
        for row, index in enumerate(indices):
            generator = np.random.default_rng((self.seed, step, index, stream))
            share_T, any_T = generator.random(tokens_BT.shape[1]), generator.integers(0, words, tokens_BT.shape[1])
            new_T = np.where(share_T < 1 - KEPT - RANDOM, hidden, any_T)
            taken_T = mask_BT[row] & (share_T < 1 - KEPT)
            replaced_BT[row, taken_T] = new_T[taken_T]
        return replaced_BT
