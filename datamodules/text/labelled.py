"""Texts with a class each, and those of a file of the user's: one text a line, or two that belong together.

Shapes: N samples, T tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.order import content_of
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets, require_val_size, split_rows
from lightspan.datamodules.text.batch import LabelledPairBatch, LabelledTextBatch
from lightspan.datamodules.text.json_lines import json_lines, text_in
from lightspan.datamodules.text.tokenized import require_length, tokenized, tokenized_pairs

MOST_CLASSES = 2**20
"""A number of a class beyond it is a mistake, and would fill the memory with classes that no line has."""


class LabelledTokens(NamedTuple):
    """tokens: int32 [N, T], padded at the end; lengths: int64 [N], tokens that are not padding; labels: int64 [N];
    types: int8 [N, T], of two texts, see `LabelledPairBatch`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    types: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        labels: Sequence[int],
        length: int,
        seconds: Sequence[str] | None = None,
    ) -> "LabelledTokens":
        """Special tokens included, truncated or padded to T = length."""
        if seconds is None:
            tokens, mask = tokenized(tokenizer, texts, length)
            narrow = None
        else:
            tokens, mask, types = tokenized_pairs(tokenizer, texts, seconds, length)
            narrow = types.astype(np.int8)
        return cls(tokens.astype(np.int32), mask.sum(axis=1), np.asarray(labels, dtype=np.int64), narrow)

    def at(self, places: np.ndarray) -> "LabelledTokens":
        types = None if self.types is None else self.types[places]
        return LabelledTokens(self.tokens[places], self.lengths[places], self.labels[places], types)


class LabelledTextSamples:
    """Samples of `LabelledTextBatch`, of two texts of `LabelledPairBatch`. The seed is not used: nothing is random."""

    def __init__(self, data: LabelledTokens) -> None:
        self.data = data

    @property
    def batch_type(self) -> type:
        return LabelledTextBatch if self.data.types is None else LabelledPairBatch

    def __len__(self) -> int:
        return len(self.data.labels)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        tokens = torch.from_numpy(self.data.tokens[index].astype(np.int64))
        types = self.data.types
        return {
            "tokens": tokens,
            "mask": (torch.arange(len(tokens)) < int(self.data.lengths[index])).long(),
            "label": torch.tensor(int(self.data.labels[index])),
            "index": torch.tensor(index),
            **({} if types is None else {"token_types": torch.from_numpy(types[index].astype(np.int64))}),
        }


class LabelledRow(NamedTuple):
    """A line of a file. label: a class's number, or its name."""

    where: str
    texts: tuple[str, ...]
    label: int | str


def labelled_row(where: str, found: Any, fields: Sequence[str], label: str) -> LabelledRow:
    """What a JSON says. Raises: UserError that names the line for missing or empty texts, or for no label."""
    texts = tuple(text_in(where, found, field) for field in fields)
    own = found.get(label)
    is_number = isinstance(own, int) and not isinstance(own, bool) and 0 <= own < MOST_CLASSES
    if not (is_number or (isinstance(own, str) and own)):
        raise UserError(f"{where} has no {label} that is a whole number in [0, {MOST_CLASSES:,}), or a class's name")
    return LabelledRow(where, texts, own)


class LabelledTextFiles(SampleSets):
    """Texts of a file, one JSON object a line: `LabelledTextBatch`. Or two texts a line that belong together, such as a
    question and a passage: `LabelledPairBatch`.

    Labels are whole numbers from 0 up, or names, whose numbers are those of the training file's in sorted order.

    Args:
        path: lines such as {"text": "...", "label": 1}.
        tokenizer: turns a text, or two, into tokens, special tokens included.
        val_path: likewise, to validate on; None takes `val_size` of the first file.
        test_path: likewise, for `lightspan test`.
        val_size: samples, evenly spaced, at least 1; None takes a tenth of the file, at most 1,000.
        fields: the text's name in a line, or the names of two.
        label: the class's name in a line.
        length: T, tokens that are read, at least 3; of two texts the longer one is cut first.
        settings: those of `SampleSets`.

    Attributes:
        num_classes: of the training file; after `setup`.

    Raises: UserError at setup for a file that cannot be read, naming the line, for too few lines, and for a class that
        the training file does not have.
    """

    num_classes: int

    def __init__(
        self,
        path: ReadPath,
        tokenizer: PreTrainedTokenizerBase,
        val_path: ReadPath | None = None,
        test_path: ReadPath | None = None,
        val_size: int | None = None,
        fields: tuple[str, ...] = ("text",),
        label: str = "label",
        length: int = 128,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        require_length(length)
        if len(fields) not in (1, 2) or len({*fields, label}) <= len(fields):
            raise UserError(f"fields={[*fields]} must be the names of one text or two, other than label={label}")
        require_val_size(val_size)
        self.path, self.val_path, self.test_path, self.val_size = path, val_path, test_path, val_size
        self.tokenizer, self.fields, self.label, self.length = tokenizer, tuple(fields), label, length

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises all files, once."""
        if self.train is not None:
            return
        training, validation = split_rows(self._rows, self.path, self.val_path, self.val_size, "lines")
        rows = training if self.val_path is not None else [*training, *validation]
        test = [] if self.test_path is None else self._rows(self.test_path, "test_path")
        names = sorted({row.label for row in rows if isinstance(row.label, str)})
        numbers = {row.label for row in rows if isinstance(row.label, int)}
        if names and numbers:
            raise UserError(
                f"{self.path} has labels that are names, such as {names[0]!r:.80}, and others that are numbers"
            )
        self.num_classes = len(names) or max(map(int, numbers)) + 1
        known: Sequence[int | str] = names or range(self.num_classes)
        classes = {name: number for number, name in enumerate(known)}
        self.train = self.bank = self._samples(training, classes)
        self.val = self._samples(validation, classes)
        if test:
            self.test = self._samples(test, classes)
        largest = np.bincount(self.val.data.labels).max() / len(self.val)
        say(
            f"labelled texts: {len(training):,} to train on, {len(validation):,} to validate on, {len(test):,} to test "
            f"on, of {self.num_classes} classes; the largest has {largest:.1%} of those to validate on"
        )

    def blank(self) -> LabelledTextSamples | None:
        """Two texts that fill their rows, of class 0, where the file is not here."""
        if expanded(self.path, "data.init_args.path").exists():
            return None
        words = ["to be or not to be " * self.length] * 2
        return LabelledTextSamples(
            LabelledTokens.of(self.tokenizer, words, [0, 0], self.length, words if len(self.fields) == 2 else None)
        )

    def training_content(self) -> str:
        data: LabelledTokens = self.train.data  # type: ignore[union-attr]
        return content_of(column for column in data if column is not None)

    def test_dataloader(self) -> EvaluationLoader:
        if self.test_path is None:
            raise UserError("there is nothing to test on; name a file with labels as data.init_args.test_path")
        return self._evaluate(self.test)

    def _rows(self, path: str, setting: str) -> list[LabelledRow]:
        lines = json_lines(path, f"data.init_args.{setting}", "text", f"{self.fields[0]} and {self.label}")
        return [labelled_row(*line, self.fields, self.label) for line in lines]

    def _samples(self, rows: Sequence[LabelledRow], classes: dict[int | str, int]) -> LabelledTextSamples:
        for row in rows:
            if row.label not in classes:
                raise UserError(f"{row.where} is of the class {row.label!r:.80}, which {self.path} does not have")
        texts, *seconds = zip(*(row.texts for row in rows), strict=True)
        labels = [classes[row.label] for row in rows]
        return LabelledTextSamples(LabelledTokens.of(self.tokenizer, texts, labels, self.length, *seconds))
