"""Queries and the documents that answer them, from a file of the user's or from the Python files of a folder.

Shapes: N queries, M documents, T and U tokens of a query and of a document.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.loading.order import content_of
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets, require_val_size, split_rows
from lightspan.datamodules.text.batch import ScoredPairBatch, TokenPairBatch
from lightspan.datamodules.text.functions import library_functions
from lightspan.datamodules.text.json_lines import json_lines, text_in
from lightspan.datamodules.text.tokenized import require_length, tokenized
from lightspan.datamodules.text.windows import in_validation

LARGEST_SCORE = float(np.finfo(np.float32).max)


class Texts(NamedTuple):
    """tokens: int32 [N, T], padded at the end. lengths: int64 [N], tokens that are not padding."""

    tokens: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> "Texts":
        if not texts:
            return cls(np.zeros((0, length), np.int32), np.zeros(0, np.int64))
        tokens, mask = tokenized(tokenizer, texts, length)
        return cls(tokens.astype(np.int32), mask.sum(axis=1))

    def row(self, number: int) -> tuple[Tensor, Tensor]:
        """(tokens, mask), int64 [T]."""
        tokens = torch.from_numpy(self.tokens[number].astype(np.int64))
        return tokens, (torch.arange(len(tokens)) < int(self.lengths[number])).long()


class Pair(NamedTuple):
    """A line of a file. score: None where the file has none."""

    query: str
    document: str
    negatives: tuple[str, ...] = ()
    score: float | None = None


class TextPairSamples:
    """Samples of `TokenPairBatch`, or of `ScoredPairBatch` with scores.

    Args:
        queries, documents: the texts; query i is answered by document i.
        others: texts that answer none.
        negatives: of each query the numbers in `others` of those that are near it and do not answer it.
        count: how many of these a sample has, drawn by its seed, with repetition where there are fewer.
        scores: float32 [N].
    """

    def __init__(
        self,
        queries: Texts,
        documents: Texts,
        others: Texts | None = None,
        negatives: Sequence[Sequence[int]] = (),
        count: int = 0,
        scores: np.ndarray | None = None,
    ) -> None:
        self.queries, self.documents, self.others = queries, documents, others
        self.negatives, self.count, self.scores = negatives, count, scores

    @property
    def batch_type(self) -> type:
        return TokenPairBatch if self.scores is None else ScoredPairBatch

    def __len__(self) -> int:
        return len(self.queries.lengths)

    def arrays(self) -> list[np.ndarray]:
        """All that the samples consist of."""
        texts = [side for side in (self.queries, self.documents, self.others) if side is not None]
        own = [np.asarray(places, np.int64) for places in self.negatives]
        scores = [] if self.scores is None else [self.scores]
        return [*(array for side in texts for array in side), *own, *scores]

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        tokens, mask = self.queries.row(index)
        rows = [self.documents.row(index)]
        if self.count:
            assert self.others is not None
            own, generator = self.negatives[index], np.random.default_rng(seed)
            rows += [
                self.others.row(own[int(place)])
                for place in generator.choice(len(own), self.count, replace=len(own) < self.count)
            ]
        documents, masks = (torch.stack(part) for part in zip(*rows, strict=True))
        sample = {"tokens": tokens, "mask": mask, "document_tokens": documents, "document_mask": masks}
        if self.scores is not None:
            sample["score"] = torch.tensor(float(self.scores[index]), dtype=torch.float32)
        return sample | {"index": torch.tensor(index)}


def read_pairs(path: str, negatives: int, scored: bool) -> list[Pair]:
    """The pairs of a file, one JSON object a line: `query` and `document`, texts; `negatives`, a list of texts, where
    some are asked for; `score`, a number, where one is. Empty lines are passed over.

    Raises: UserError naming the line.
    """
    lines = json_lines(path, "data.init_args.path", "pair", "query and document")
    return [pair_of(*line, negatives, scored) for line in lines]


def pair_of(where: str, found: Any, negatives: int, scored: bool = False) -> Pair:
    """A pair of what a JSON says. Raises: UserError for missing or empty texts, or too few of them."""
    query, document = (text_in(where, found, name) for name in ("query", "document"))
    others = found.get("negatives", [])
    if not isinstance(others, list) or not all(isinstance(text, str) and text.strip() for text in others):
        raise UserError(f"{where}: negatives must be a list of texts, none of them empty")
    if negatives and not others:
        raise UserError(
            f"{where} has no negatives, and data.init_args.negatives={negatives} asks for some; set it to 0"
        )
    score = found.get("score")
    # NaN is not below either. What float32 would round to infinity is refused with it.
    if scored and (isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= LARGEST_SCORE):
        raise UserError(f"{where} has no score that is a finite number of 32 bits")
    return Pair(query, document, tuple(others), float(score) if scored else None)


class Pairs(SampleSets):
    """What the data modules of pairs share.

    Args:
        tokenizer: turns a text into tokens, special tokens included; one for both sides.
        query_length, document_length: T and U, tokens that are read, at least 3.
        batch_size: queries of one optimiser step over all ranks.
        settings: the others of `SampleSets`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query_length: int = 32,
        document_length: int = 128,
        batch_size: int = 128,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, **settings)
        require_length(query_length, "query_length")
        require_length(document_length, "document_length")
        self.tokenizer, self.query_length, self.document_length = tokenizer, query_length, document_length

    def training_content(self) -> str:
        return content_of(self.train.arrays())  # type: ignore[union-attr]

    def samples(self, pairs: Sequence[Pair], negatives: int = 0) -> TextPairSamples:
        """Tokenised, each text once."""
        others = sorted({text for pair in pairs for text in pair.negatives}) if negatives else []
        number = {text: place for place, text in enumerate(others)}
        return TextPairSamples(
            Texts.of(self.tokenizer, [pair.query for pair in pairs], self.query_length),
            Texts.of(self.tokenizer, [pair.document for pair in pairs], self.document_length),
            Texts.of(self.tokenizer, others, self.document_length),
            [[number[text] for text in pair.negatives] for pair in pairs] if negatives else (),
            negatives,
            np.asarray([pair.score for pair in pairs], np.float32) if pairs and pairs[0].score is not None else None,
        )


class LibraryPairs(Pairs):
    """First lines of docstrings and the bodies of their functions: `TokenPairBatch` with P = 1. No download.

    Files are held out to validate on as a whole, by a hash of their path.

    Args:
        folder: with Python files; None is the standard library of the Python that runs.
        val_fraction: of the files, in (0, 1).
        settings: those of `Pairs`.
    Raises: UserError at setup for a folder without documented functions, or where one of the sets is empty.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        folder: ReadPath | None = None,
        val_fraction: float = 0.15,
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, **settings)
        if not 0 < val_fraction < 1:
            raise UserError(f"val_fraction={val_fraction} must lie in (0, 1)")
        self.folder, self.val_fraction = folder, val_fraction

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises all functions, once."""
        if self.train is not None:
            return
        sides: tuple[list[Pair], list[Pair]] = [], []
        for file, query, body in library_functions(self.folder):
            sides[in_validation(file, self.val_fraction)].append(Pair(query, body))
        if not all(sides):
            raise UserError(
                f"of the functions {len(sides[0])} are to train on and {len(sides[1])} to validate on; give more "
                f"files, or another val_fraction than {self.val_fraction}"
            )
        self.train = self.bank = self.samples(sides[0])
        self.val = self.samples(sides[1])
        say(f"functions: {len(sides[0])} to train on, {len(sides[1])} of other files to validate on")


class TextPairs(Pairs):
    """Pairs of a file, one JSON object a line: `TokenPairBatch`.

    Args:
        path: lines such as {"query": "...", "document": "...", "negatives": ["...", "..."]}.
        val_path: likewise, to validate on; None takes `val_size` of the first file.
        val_size: pairs, evenly spaced, at least 1; None takes a tenth of the file, at most 1,000.
        negatives: texts of `negatives` that a training query gets beside its document, drawn anew in each epoch.
            Validation has none: all documents are there to be found.
        settings: those of `Pairs`.
    Raises: UserError at setup for a file that cannot be read, naming the line, or too few pairs.
    """

    scored = False

    def __init__(
        self,
        path: ReadPath,
        tokenizer: PreTrainedTokenizerBase,
        val_path: ReadPath | None = None,
        val_size: int | None = None,
        negatives: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, **settings)
        require_val_size(val_size)
        if negatives < 0:
            raise UserError(f"negatives={negatives} must be at least 0")
        numbers = self.query_length + (1 + negatives) * self.document_length
        require_numbers(numbers, negatives=negatives, document_length=self.document_length)
        self.path, self.val_path, self.val_size, self.negatives = path, val_path, val_size, negatives

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises all pairs, once."""
        if self.train is not None:
            return
        training, validation = split_rows(self._read, self.path, self.val_path, self.val_size, "pairs")
        self.train = self.samples(training, self.negatives)
        self.bank, self.val = self.samples(training), self.samples(validation)
        say(f"pairs: {len(training)} to train on, {len(validation)} to validate on")

    def _read(self, path: str, setting: str) -> list[Pair]:
        return read_pairs(path, 0 if setting == "val_path" else self.negatives, self.scored)


class ScoredPairs(TextPairs):
    """Pairs of a file with `score`, how alike `query` and `document` are: `ScoredPairBatch`, such as STS-B's.

    Args:
        path: lines such as {"query": "...", "document": "...", "score": 3.5}.
        settings: those of `TextPairs` but `negatives`.
    """

    scored = True

    def __init__(self, path: ReadPath, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__(path, tokenizer, **settings)
        if self.negatives:
            raise UserError(f"negatives={self.negatives}: pairs with scores have none; leave it out")
