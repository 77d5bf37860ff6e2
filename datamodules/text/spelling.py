"""Words as rows of letters, and lists of words to spell. Shapes: N words, T letters."""

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import whole_text
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets, require_enough, spaced
from lightspan.datamodules.text.batch import SpellingBatch
from lightspan.datamodules.text.tokenized import require_length, tokenized

PRINTABLE = "".join(map(chr, range(33, 127)))
"""The 94 characters of ASCII that can be seen: PARSeq's alphabet."""
SENTENCE = "a photo of a '{}'"


def normalised(line: str) -> str:
    """A word as DPTR's code has it: NFKD, without what is not ASCII and without spaces."""
    return "".join(unicodedata.normalize("NFKD", line).encode("ascii", "ignore").decode().split())


def require_alphabet(alphabet: str | None) -> str:
    """The letters; None is `PRINTABLE`. Raises: UserError for none, or one that comes twice."""
    letters = PRINTABLE if alphabet is None else alphabet
    if not letters or len(set(letters)) < len(letters):
        raise UserError(f"alphabet={letters!r} must name at least one letter, each once")
    return letters


def spelled(words: Sequence[str], longest: int, alphabet: str) -> np.ndarray:
    """int64 [N T], T = longest: 1 + a letter's place in the alphabet, and 0 behind a word's end.

    Raises: UserError for a word that is longer, or has a letter that is not in the alphabet.
    """
    number = {letter: place + 1 for place, letter in enumerate(alphabet)}
    characters = np.zeros((len(words), longest), dtype=np.int64)
    for row, word in zip(characters, words, strict=True):
        if len(word) > longest:
            raise UserError(
                f"{word!r} has {len(word)} letters, more than longest={longest}; leave it out, or raise longest"
            )
        if unknown := sorted(set(word) - number.keys()):
            raise UserError(
                f"{word!r} has {', '.join(map(repr, unknown))}, outside of the alphabet {alphabet!r}; leave the word "
                "out, or add what it is spelled with"
            )
        row[: len(word)] = [number[letter] for letter in word]
    return characters


def sentences(words: Sequence[str], sentence: str) -> list[str]:
    """The sentence with each word in place of {}. Raises: UserError for one without such a place."""
    if sentence.count("{}") != 1:
        raise UserError(f"sentence={sentence!r} needs one {{}} where the word goes")
    return [sentence.replace("{}", word) for word in words]


class SpellingSamples:
    """Samples of `SpellingBatch`. The seed is not used: a word has nothing random."""

    batch_type = SpellingBatch

    def __init__(
        self,
        words: list[str],
        tokenizer: PreTrainedTokenizerBase,
        longest: int,
        alphabet: str,
        sentence: str,
        length: int,
    ) -> None:
        self.words, self.tokenizer, self.longest, self.alphabet = words, tokenizer, longest, alphabet
        self.sentence, self.length = sentence, length

    def __len__(self) -> int:
        return len(self.words)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        return {name: column[0] for name, column in self.batch([index], [seed]).items()}

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> dict[str, Tensor]:
        words = [self.words[index] for index in indices]
        tokens, mask = tokenized(self.tokenizer, sentences(words, self.sentence), self.length)
        fields = {"characters": spelled(words, self.longest, self.alphabet), "tokens": tokens, "mask": mask}
        return {name: torch.from_numpy(field) for name, field in fields.items()} | {
            "index": torch.tensor(list(indices), dtype=torch.int64)
        }


class WordList(SampleSets):
    """Words of a text file, one a line, each with a sentence around it: batches of `SpellingBatch`.

    Words are `normalised`. Those of more than `longest` letters, and empty lines, are left out.

    Args:
        path: of the file, UTF-8.
        tokenizer: turns a sentence into tokens, special tokens included.
        alphabet: letters in the order of their numbers; None is the 94 printable characters of ASCII.
        longest: T, letters of the longest word, at least 1.
        sentence: with {} where the word goes.
        length: tokens of a sentence that are read, special ones included, at least 3.
        val_size: words, evenly spaced, held out to validate on, at least 1.
        batch_size: words of one optimiser step over all ranks.
        settings: the others of `SampleSets`.
    Raises: UserError at setup for a file that cannot be read, too few words, or a letter outside the alphabet.
    """

    def __init__(
        self,
        path: ReadPath,
        tokenizer: PreTrainedTokenizerBase,
        alphabet: str | None = None,
        longest: int = 25,
        sentence: str = SENTENCE,
        length: int = 77,
        val_size: int = 1000,
        batch_size: int = 384,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, **settings)
        require_length(length)
        sentences([], sentence)
        if longest < 1 or val_size < 1:
            raise UserError(f"WordList longest={longest} and val_size={val_size} must be at least 1")
        require_numbers(longest, longest=longest)
        self.path, self.tokenizer, self.alphabet = path, tokenizer, require_alphabet(alphabet)
        self.longest, self.sentence, self.length, self.val_size = longest, sentence, length, val_size

    def setup(self, stage: str | None = None) -> None:
        """Reads and checks all words, once."""
        if self.train is not None:
            return
        path = expanded(self.path, "data.init_args.path")
        try:
            lines = whole_text(path).splitlines()
        except ValueError as error:
            raise UserError(f"data.init_args.path={path} is no list of words: {error}") from error
        words = [word for word in map(normalised, lines) if 0 < len(word) <= self.longest]
        require_enough(None, self.val_size, len(words), f"words of {path}")
        spelled(words, self.longest, self.alphabet)
        held = spaced(np.arange(len(words)), self.val_size)
        rest = np.setdiff1d(np.arange(len(words)), held)
        settings = self.tokenizer, self.longest, self.alphabet, self.sentence, self.length
        self.train = self.bank = SpellingSamples([words[i] for i in rest], *settings)
        self.val = SpellingSamples([words[i] for i in held], *settings)
        say(
            f"words: {len(rest)} to train on and {len(held)} to validate on, {len(lines) - len(words)} lines left out "
            f"as empty or longer than {self.longest} letters"
        )
