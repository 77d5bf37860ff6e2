"""Texts that ask about a clip, and answer: what a `ClipTextBatch` has beside its clip.

Shapes: L tokens of a text.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.datamodules.text.chat import Conversation, RenderedPart, Renderer
from lightspan.datamodules.text.forms import padded

PLACE = "<video>"
"""Where the clip stands in a question."""


class AnsweredQuestion(NamedTuple):
    """tokens: int32 [n]; learned: bool [n], those of the answer; clip_at: which token the clip stands before."""

    tokens: np.ndarray
    learned: np.ndarray
    clip_at: int

    @property
    def content(self) -> tuple[np.ndarray, ...]:
        """Whatever makes it another one."""
        return self.tokens, self.learned, np.array([self.clip_at])

    def fields(self, length: int) -> dict[str, Tensor]:
        """Of a sample, cut or padded at the end to `length` tokens."""
        tokens, learned = self.tokens[:length], self.learned[:length]
        return {
            "tokens": padded(tokens, length),
            "mask": padded(np.ones(len(tokens)), length),
            "learned": padded(learned, length),
            "clip_at": torch.tensor(min(self.clip_at, length)),
        }


class Questions:
    """Makes tokens of questions with their answers.

    A text begins with the token that begins texts, if the tokenizer gives them one, and ends with the one that ends
    them. What stands before the clip is cut into tokens by itself, as LLaVA does; all behind it as a whole, where the
    tokenizer tells where tokens stand.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.renderer = Renderer(tokenizer)

    def tokens(self, where: str, question: str, answer: str) -> AnsweredQuestion:
        """Raises: UserError for a question that does not have the clip in one place, or an empty answer.

        Args:
            where: the line, for messages.
        """
        require_place(where, question)
        if not answer.strip():
            raise UserError(f"{where} has an empty answer, and answers are what is learned")
        before, _, behind = question.partition(PLACE)
        start, said = self.renderer.parts(Conversation(where, (), (before, answer)))
        first, _ = self.renderer.tokens_of(where, [start])
        rest, learned = self.renderer.tokens_of(where, [RenderedPart(behind, False), said])
        known = np.concatenate([np.zeros(len(first), dtype=bool), learned])
        return AnsweredQuestion(np.concatenate([first, rest]), known, len(first))

    def special_in(self, question: str, answer: str) -> bool:
        """Whether a text has what looks like a special token, and would begin or end it; `<video>` is none."""
        return self.renderer.special_in(Conversation("", (), (question.replace(PLACE, ""), answer)))


def require_place(where: str, question: str) -> None:
    """Raises: UserError for a question that does not have the clip in one place."""
    if (count := question.count(PLACE)) != 1:
        raise UserError(
            f"{where} has {PLACE} {count} times in {question!r:.80}; write it once, where the clip is to stand, such "
            f'as "USER: {PLACE}\\nWhat happens? ASSISTANT: "'
        )
