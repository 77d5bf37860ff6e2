"""Texts as tokens, with the word of each token: for masks of whole words. Shapes: N texts, T tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.tokenizing import cut
from lightspan.datamodules.loading.order import content_of
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets
from lightspan.datamodules.text.batch import WholeWordBatch
from lightspan.datamodules.text.functions import library_functions
from lightspan.datamodules.text.json_lines import json_lines, text_in
from lightspan.datamodules.text.tokenized import require_length
from lightspan.datamodules.text.windows import in_validation


class WordCutter:
    """A text as the fields of a `WholeWordBatch` but `index`.

    Of a text of more tokens a part is taken at a random place, as SMAE's code does, and the special tokens stand around
    it as the tokenizer has them. One that knows no words (a slow one of transformers) has one word a token. Words that
    look like a special token are text.

    Args:
        tokenizer: puts as many special tokens around every text.
        length: T, at least 3.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        require_length(length)
        self.tokenizer, self.length = tokenizer, length
        own, around = (list(cut(tokenizer, "a", add_special_tokens=special)["input_ids"]) for special in (False, True))
        places = (place for place in range(len(around)) if around[place : place + len(own)] == own)
        start = next(places, 0)
        self.before, self.after = around[:start], around[start + len(own) :]
        if (special := len(self.before) + len(self.after)) >= length:
            raise UserError(f"length={length} leaves no room beside the {special} special tokens of a text")
        self.padding = tokenizer.pad_token_id or 0

    def tokens_and_words(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """int32 [L], without special tokens."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        encoded = cut(self.tokenizer, text, verbose=False, **options)
        tokens = encoded["input_ids"]
        words = encoded.word_ids() if self.tokenizer.is_fast else range(len(tokens))
        return np.asarray(tokens, np.int32), np.asarray([-1 if word is None else word for word in words], np.int32)

    def cut(self, tokens: np.ndarray, words: np.ndarray, seed: int) -> dict[str, Tensor]:
        room = self.length - len(self.before) - len(self.after)
        start = int(np.random.default_rng(seed).integers(len(tokens) - room + 1)) if len(tokens) > room else 0
        part = slice(start, start + room)
        own = [*self.before, *tokens[part].tolist(), *self.after]
        word = [*[-1] * len(self.before), *words[part].tolist(), *[-1] * len(self.after)]
        rest = self.length - len(own)
        return {
            "tokens": torch.tensor(own + [self.padding] * rest),
            "mask": (torch.arange(self.length) < len(own)).long(),
            "word": torch.tensor(word + [-1] * rest),
        }


class WholeWordSamples:
    """Samples of `WholeWordBatch`; the seed of a sample says which part of a long text it holds."""

    batch_type = WholeWordBatch

    def __init__(self, texts: Sequence[str], cutter: WordCutter) -> None:
        self.cutter = cutter
        parts = [cutter.tokens_and_words(text) for text in texts]
        self.ends = np.cumsum([len(tokens) for tokens, _ in parts])
        self.tokens, self.words = (np.concatenate(column) for column in zip(*parts, strict=True))

    def __len__(self) -> int:
        return len(self.ends)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        own = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        return self.cutter.cut(self.tokens[own], self.words[own], seed) | {"index": torch.tensor(index)}


class WholeWords(SampleSets):
    """Texts of a file, or the functions of the standard library: `WholeWordBatch`.

    Args:
        tokenizer: see `WordCutter`.
        path: a file with one JSON object a line, `text`; None takes the bodies of documented functions, as
            `lightspan.datamodules.text.pairs.LibraryPairs` does, and holds out the same files.
        folder: with Python files, where there is no path; None is the standard library of the Python that runs.
        length: T, tokens that are read, at least 3.
        val_fraction: of the files, or of the lines by a hash of the text, held out to validate on, in (0, 1).
        batch_size: texts of one optimiser step over all ranks.
        settings: the others of `SampleSets`.
    Raises: UserError at setup for a file that cannot be read, naming the line, or if one of the sets is empty.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        path: ReadPath | None = None,
        folder: ReadPath | None = None,
        length: int = 128,
        val_fraction: float = 0.15,
        batch_size: int = 64,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, **settings)
        if path is not None and folder is not None:
            raise UserError(f"path={path} and folder={folder} both say what to read; leave one of them out")
        if not 0 < val_fraction < 1:
            raise UserError(f"val_fraction={val_fraction} must lie in (0, 1)")
        self.cutter = WordCutter(tokenizer, length)
        self.path, self.folder, self.val_fraction = path, folder, val_fraction

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises all texts, once."""
        if self.train is not None:
            return
        sides: tuple[list[str], list[str]] = [], []
        for key, text in self._texts():
            sides[in_validation(key, self.val_fraction)].append(text)
        if not all(sides):
            raise UserError(
                f"of the texts {len(sides[0])} are to train on and {len(sides[1])} to validate on; give more, or "
                f"another val_fraction than {self.val_fraction}"
            )
        self.train, self.val = (WholeWordSamples(texts, self.cutter) for texts in sides)
        self.bank = self.train
        say(f"texts: {len(sides[0])} to train on, {len(sides[1])} to validate on")

    def training_content(self) -> str:
        return content_of([self.train.tokens, self.train.words, self.train.ends])  # type: ignore[union-attr]

    def _texts(self) -> list[tuple[str, str]]:
        """(what the hash is of, text)."""
        if self.path is None:
            return [(function.file, function.body) for function in library_functions(self.folder)]
        lines = json_lines(self.path, "data.init_args.path", "text", "text")
        return [(text, text) for text in (text_in(*line, "text") for line in lines)]
