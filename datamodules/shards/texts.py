"""Texts from tar shards: pairs of a query and documents, and texts whose words are masked."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.shards.decoders import decode_fields, place_of
from lightspan.datamodules.shards.stand_ins import NOWHERE
from lightspan.datamodules.shards.stream import Decoding, Shards
from lightspan.datamodules.text.batch import TokenPairBatch, WholeWordBatch
from lightspan.datamodules.text.pairs import pair_of
from lightspan.datamodules.text.tokenized import require_length, tokenized
from lightspan.datamodules.text.whole_words import WordCutter


@dataclass(frozen=True)
class QueryDecoding(Decoding):
    """The fields of a `TokenPairBatch` from a JSON as `lightspan.datamodules.text.pairs.read_pairs` has it."""

    batch_type = TokenPairBatch

    tokenizer: PreTrainedTokenizerBase
    lengths: tuple[int, int]
    negatives: int

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        found = decode_fields(members, self.fields)["pair"]
        pair = pair_of(place_of(members), found, self.negatives)
        documents = [pair.document]
        if self.negatives:
            few = len(pair.negatives) < self.negatives
            chosen = np.random.default_rng(seed).choice(len(pair.negatives), self.negatives, replace=few)
            documents += [pair.negatives[int(place)] for place in chosen]
        query, document = (
            [torch.from_numpy(column) for column in tokenized(self.tokenizer, texts, length)]
            for texts, length in zip(([pair.query], documents), self.lengths, strict=True)
        )
        names = ("tokens", "mask", "document_tokens", "document_mask")
        return dict(zip(names, (query[0][0], query[1][0], *document), strict=True))


class QueryShards(Shards):
    """Batches are `TokenPairBatch`, from members KEY.json, such as MS MARCO's passages. Order, resume, damage and
    memory are those of `Shards`. Validation queries have no negatives: all documents are there to be found.

    Args:
        shards, val_shards: as in `Shards`. A member has `query`, `document` and `negatives`, a list.
        tokenizer: turns a text into tokens, special tokens included.
        query_length, document_length: tokens that are read, at least 3.
        negatives: drawn of the list in each epoch, >= 0.
        settings: the others of `Shards` but `fields`, `image_size`, `views` and `views_on`.
    """

    def __init__(
        self,
        shards: list[ReadPath],
        tokenizer: PreTrainedTokenizerBase,
        val_shards: list[ReadPath] | None = None,
        query_length: int = 32,
        document_length: int = 196,
        negatives: int = 7,
        **settings: Any,
    ) -> None:
        super().__init__(shards, val_shards, fields={"pair": "json"}, **settings)
        require_length(query_length, "query_length")
        require_length(document_length, "document_length")
        if negatives < 0:
            raise UserError(f"negatives={negatives} must be at least 0")
        numbers = query_length + (1 + negatives) * document_length
        require_numbers(numbers, negatives=negatives, document_length=document_length)
        plain = vars(self.decode) | {"tokenizer": tokenizer, "lengths": (query_length, document_length)}
        self.decode = QueryDecoding(**plain, negatives=negatives)
        self.decode_alone = QueryDecoding(**plain, negatives=0)

    def setup(self, stage: str | None = None) -> None:
        """As `Shards.setup`; validation samples then have no negatives."""
        if self.train is None:
            super().setup(stage)
            assert self.val is not None
            self.val = self.val.decoded_by(self.decode_alone)

    def example(self) -> dict[str, Any]:
        """A query of a letter."""
        return self.decode(NOWHERE | {"json": b'{"query": "a", "document": "a", "negatives": ["a"]}'}, seed=0)


@dataclass(frozen=True)
class WordDecodingOfTexts(Decoding):
    """The fields of a `WholeWordBatch` from a text."""

    batch_type = WholeWordBatch

    cutter: WordCutter

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        text = decode_fields(members, self.fields)["text"]
        if not text.strip():
            raise UserError(f"{place_of(members)} is an empty text; data.init_args.skip_damaged=true takes another")
        return self.cutter.cut(*self.cutter.tokens_and_words(text), seed)


class WholeWordShards(Shards):
    """Batches are `WholeWordBatch`, from members KEY.txt, such as FineWeb's; order, resume, damage and memory are those
    of `Shards`.

    Args:
        shards, val_shards: as in `Shards`.
        tokenizer: a fast one of transformers, which knows the words of its tokens.
        length: T, tokens that are read, at least 3.
        settings: the others of `Shards` but `fields`, `image_size`, `views` and `views_on`.
    """

    def __init__(
        self,
        shards: list[ReadPath],
        tokenizer: PreTrainedTokenizerBase,
        val_shards: list[ReadPath] | None = None,
        length: int = 512,
        **settings: Any,
    ) -> None:
        super().__init__(shards, val_shards, fields={"text": "txt"}, **settings)
        self.decode = WordDecodingOfTexts(**vars(self.decode), cutter=WordCutter(tokenizer, length))

    def example(self) -> dict[str, Any]:
        """A text of a letter."""
        return self.decode(NOWHERE | {"txt": b"a"}, seed=0)
