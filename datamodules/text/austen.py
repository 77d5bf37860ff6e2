"""Six novels by Jane Austen, 0.7 million words, from the R package janeaustenr. Nothing is downloaded."""

from typing import Any, Literal, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.tokenizing import cut
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.ranks import say, sizes
from lightspan.datamodules.r_data import read_r_data
from lightspan.datamodules.text.windows import TextData, Windows

Book = Literal["emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility"]
BOOKS: tuple[Book, ...] = get_args(Book)


class Austen(TextData):
    """Windows of tokens, each inside one book: `TextBatch`, tokens int64 [B, T+1].

    Whole books are held out for testing, and the end of the others for choosing settings; no text is in two of the
    parts.

    Args:
        tokenizer: turns a book into tokens; None uses its bytes (UTF-8).
        held_out: the books to test on; all others are for training.
        val_fraction: share of each book trained on, at its end, that is held out to validate on, in [0, 1).
            0 trains on all of them and validates on the books held out.
        library: folder of R packages that contains janeaustenr; None searches the usual places.
        context, batch_size, settings: those of `TextData`.

    Attributes:
        bytes_per_token: mean over the training books; `CausalLM` needs it to turn nats per token into bits per byte.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        held_out: tuple[Book, ...] = ("persuasion",),
        val_fraction: float = 0.0,
        library: ReadPath | None = None,
        context: int = 128,
        batch_size: int = 8,
        **settings: Any,
    ) -> None:
        super().__init__(context, batch_size, **settings)
        if not 0 <= val_fraction < 1:
            raise UserError(f"val_fraction={val_fraction} is outside [0, 1); 0 validates on the books held out")
        unknown = [book for book in held_out if book not in BOOKS]
        if unknown or not 0 < len(set(held_out)) < len(BOOKS):
            raise UserError(
                f"held_out={list(held_out)} must name at least one of {', '.join(BOOKS)} and leave one to train on"
            )
        self.tokenizer, self.held_out, self.val_fraction, self.library = tokenizer, held_out, val_fraction, library

    def setup(self, stage: str | None = None) -> None:
        """Read, split and tokenise, once."""
        if self.train is not None:
            return
        texts = {
            book: "\n".join(lines)
            for book, lines in zip(BOOKS, read_r_data("janeaustenr", BOOKS, self.library), strict=True)
        }
        tokens = {book: encode(text, self.tokenizer) for book, text in texts.items()}
        windows = {book: Windows(tokens[book], self.context + 1).windows for book in BOOKS}
        trained = [book for book in BOOKS if book not in self.held_out]
        cuts = {book: len(windows[book]) - round(self.val_fraction * len(windows[book])) for book in trained}
        self.train = self._side([windows[book][: cuts[book]] for book in trained])
        self.test = self._side([windows[book] for book in self.held_out])
        ends = [windows[book][cuts[book] :] for book in trained]
        self.val = self._side(ends) if self.val_fraction else self.test
        self.bytes_per_token = sum(len(texts[b].encode()) for b in trained) / sum(len(tokens[b]) for b in trained)
        validated = len(self.val) if self.val_fraction else None
        samples = f"windows of {self.context + 1} tokens"
        say(
            f"text: {len(trained)} books to train on, {self.bytes_per_token:.2f} bytes per token; "
            f"{sizes(len(self.train), validated, len(self.test), samples)}"
        )

    def test_dataloader(self) -> EvaluationLoader:
        return self.evaluate(self.test)

    def _side(self, parts: list[np.ndarray]) -> Windows:
        text = np.concatenate(parts).reshape(-1)
        if not len(text):
            raise UserError(
                f"context={self.context} and val_fraction={self.val_fraction} leave a part without a window; lower "
                "context, or hold out a larger share"
            )
        return Windows(text, self.context + 1)


def encode(text: str, tokenizer: PreTrainedTokenizerBase | None) -> np.ndarray:
    """Whole numbers [N]: the tokens of a text of any length without special tokens, or its bytes."""
    if tokenizer is None:
        return np.frombuffer(text.encode(), dtype=np.uint8)
    ids = cut(tokenizer, text, add_special_tokens=False, verbose=False)["input_ids"]  # verbose: it warns of long texts
    return np.asarray(ids, dtype=np.int32)
