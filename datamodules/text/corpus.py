"""Anyone's text: a folder of files, or .jsonl files with a text in each line, as pieces of documents. No download.

Shapes: N tokens, D documents, P pieces.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.order import content_of
from lightspan.datamodules.loading.ranks import evaluation_loader, say
from lightspan.datamodules.loading.sample_sets import SampleSets
from lightspan.datamodules.text.documents import (
    SUFFIXES,
    VAL_FRACTION,
    Document,
    Skipped,
    TextTokens,
    encoded,
    find_documents,
    numbers_of,
)
from lightspan.datamodules.text.forms import Padded, TextForm, joined_in_training
from lightspan.datamodules.text.windows import in_validation, require_paths, require_val_fraction

SIDES = {"training": False, "validation": True}
"""Of a split: whether documents are held out."""


class Pieces:
    """Pieces of documents, each inside one of them and as long as the others of its document, give or take a token.

    Args:
        documents: as tokens, each of at least one.
        names: of the documents.
        form: makes the samples.

    Attributes:
        document: int64 [P], the document of each piece, a place in `names`.
    """

    def __init__(self, documents: list[TextTokens], names: list[str], form: TextForm) -> None:
        sizes = np.array([len(each.tokens) for each in documents], dtype=np.int64)
        counts = -(-sizes // form.longest)
        self.document = np.repeat(np.arange(len(documents)), counts)
        place = np.arange(len(self.document)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = np.repeat(np.cumsum(sizes) - sizes, counts)
        of, size = counts[self.document], sizes[self.document]
        self.starts, self.ends = first + place * size // of, first + (place + 1) * size // of
        parts = zip(*documents, strict=True) if documents else [[np.empty(0, np.int32)]] * 2
        self.text = TextTokens(*(np.concatenate(part) for part in parts))
        self.names, self.form = names, form

    @property
    def batch_type(self) -> type | None:
        return self.form.batch_type

    def __len__(self) -> int:
        return len(self.starts)

    def piece(self, index: int) -> TextTokens:
        start, end = self.starts[index], self.ends[index]
        return TextTokens(*(column[start:end] for column in self.text))

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        return {**self.form(self.piece(index), seed), "index": torch.tensor(index)}


class DocumentPieces(SampleSets, ABC):
    """Documents as pieces: batches are those of `form`.

    Training and validation are split by document, by a hash of its name alone, so no document is in both, on any
    machine. A document that is longer than a row is cut into pieces of equal length.

    Args:
        tokenizer: turns a text into tokens; None uses its bytes (UTF-8).
        form: makes the fields of a batch; None pads to 256 tokens, `DocumentBatch`.
        batch_size: pieces of one optimiser step over all ranks.
        val_fraction: share of the documents held out, in (0, 1).
        val_pieces: validation reads this many pieces, evenly spaced and always the same; None reads all.
        settings: the others of `SampleSets`.

    Attributes:
        num_tokens: numbers of tokens, from 0 up, with those that `form` adds; after `setup`.

    Raises: UserError at setup for tokens that clash with those of `form`, or too little text. Documents that are too
        short for `form` are counted and left out.
    """

    more = "documents"
    """What a user has to give more of where too little text is left."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        form: TextForm | None = None,
        batch_size: int = 16,
        val_fraction: float = VAL_FRACTION,
        val_pieces: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, **settings)
        require_val_fraction(val_fraction)
        if val_pieces is not None and val_pieces < 1:
            raise UserError(f"val_pieces={val_pieces} leaves nothing to validate on; it must be at least 1")
        self.tokenizer, self.form = tokenizer, form or Padded()
        self.val_fraction, self.val_pieces = val_fraction, val_pieces

    @abstractmethod
    def documents(self, skipped: Skipped) -> Iterator[Document]:
        """All of them, in a fixed order; what cannot be used is counted in `skipped`."""

    def setup(self, stage: str | None = None) -> None:
        """Read, split and tokenise, once."""
        if self.train is not None:
            return
        self.num_tokens = self.form.prepare(*numbers_of(self.tokenizer))
        skipped = Skipped()
        sides: dict[bool, list[Document]] = {False: [], True: []}
        for document in self.documents(skipped):
            sides[in_validation(document.name, self.val_fraction)].append(document)
        train, val = (self._pieces(side, sides[held_out], skipped) for side, held_out in SIDES.items())
        self.train = self.bank = train
        self.val = val
        total = sum(int(pieces.text.byte_counts.sum(dtype=np.int64)) for pieces in (train, val))
        tokens = sum(len(pieces.text.tokens) for pieces in (train, val))
        say(
            f"text: {len(train.names):,} training and {len(val.names):,} validation documents, {total / 1e6:.1f} MB, "
            f"{total / tokens:.2f} bytes per token, {len(train):,} and {len(val):,} pieces of at most "
            f"{self.form.longest} tokens{skipped}"
        )

    def training_content(self) -> str:
        return content_of([self.train.text.tokens, self.train.starts])  # type: ignore[union-attr]

    def val_dataloader(self) -> EvaluationLoader:
        count = len(self.val)
        chosen = min(count, self.val_pieces or count)
        indices = [i * count // chosen for i in range(chosen)]
        return evaluation_loader(self.val, self.batch_size, self.num_workers, self.trainer, indices)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lets `form` join the rows of a batch to train on."""
        return joined_in_training(self, self.form.joined, batch)

    def _pieces(self, side: str, documents: Iterable[Document], skipped: Skipped) -> Pieces:
        found, names, short = list[TextTokens](), list[str](), 0
        for name, content in documents:
            document = encoded(content, self.tokenizer)
            if len(document.tokens) < self.form.shortest:
                short += 1
                continue
            found.append(document)
            names.append(name)
        if short:
            skipped.reasons[f"of fewer than {self.form.shortest} tokens"] += short
        if not found:
            raise UserError(
                f"no {side} document of at least {self.form.shortest} tokens is left{skipped}; whole documents are "
                f"held out with val_fraction={self.val_fraction}, so give more {self.more}, or change val_fraction"
            )
        return Pieces(found, names, self.form)


class Corpus(DocumentPieces):
    """Files of text, or lines of .jsonl files, as pieces of documents.

    A document's name, by which it is in training or validation, is its path in its folder, or FILE.jsonl:LINE.

    Args:
        paths: folders and files to read. None reads the source of the running Python's standard library, tests and
            installed packages left out. A folder gives the files under it that end in `suffixes`, a file is used as it
            is.
        tokenizer, form: as in `DocumentPieces`.
        suffixes: endings of the file names taken from folders; of .jsonl files, each line is a document.
        settings: the others of `DocumentPieces`.

    Raises: UserError at setup as `DocumentPieces`, and for a missing path, a folder without a matching file, or a line
        without a text. Documents that are binary or no UTF-8 are counted and left out.
    """

    more = "documents in data.init_args.paths"

    def __init__(
        self,
        paths: list[ReadPath] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        form: TextForm | None = None,
        suffixes: tuple[str, ...] = SUFFIXES,
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, form, **settings)
        require_paths(paths, suffixes)
        self.paths, self.suffixes = paths, tuple(suffixes)

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        return find_documents(self.paths, self.suffixes, skipped)
