"""Austen's novels: whole books or ends of books are held out, windows keep to one book."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.r_data import LIBRARIES
from lightspan.datamodules.text import austen
from lightspan.datamodules.text.austen import BOOKS, Austen, encode


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each book: 200 lines of three equal letters of its own, so that every byte tells the book and line breaks."""
    texts = [[chr(ord("a") + i) * 3] * 200 for i in range(len(BOOKS))]
    monkeypatch.setattr(austen, "read_r_data", lambda package, names, library: texts)


@pytest.mark.usefixtures("books")
def test_no_window_crosses_books_and_held_out_books_are_tested_on_alone() -> None:
    data = Austen(held_out=("emma", "persuasion"), context=9, batch_size=4, val_windows=10**6)
    data.setup()
    assert data.train is not None
    letters = [set(bytes(w.astype(np.uint8)).decode()) - {"\n"} for w in data.train.windows]
    assert all(len(found) == 1 for found in letters)
    assert set.union(*letters) == set("bcef")
    tested = torch.cat([batch["tokens"] for batch in data.test_dataloader()])
    assert set(bytes(tested.flatten().tolist()).decode()) == set("ad\n")
    assert data.val is data.test
    assert data.bytes_per_token == 1


@pytest.mark.usefixtures("books")
def test_the_validation_share_is_the_end_of_each_book_trained_on() -> None:
    whole, split = Austen(context=9), Austen(context=9, val_fraction=0.25)
    for data in (whole, split):
        data.setup()
    per_book = len(whole.train.windows) // 5
    assert len(split.val) == 5 * round(0.25 * per_book)
    assert len(split.train) + len(split.val) == len(whole.train)
    kept = per_book - round(0.25 * per_book)
    parts = whole.train.windows.reshape(5, per_book, 10)
    assert np.array_equal(split.train.windows, parts[:, :kept].reshape(-1, 10))
    assert np.array_equal(split.val.windows, parts[:, kept:].reshape(-1, 10))
    assert np.array_equal(split.test.windows, whole.test.windows)


class Words:
    """Stands for a tokenizer: one token a word."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [len(word) for word in text.split()]}


def test_a_tokenizer_gives_its_tokens_and_none_gives_bytes() -> None:
    assert encode("naïve", None).tolist() == list("naïve".encode())
    tokens = encode("one three five", Words())  # type: ignore[arg-type]
    assert tokens.tolist() == [3, 5, 4]
    assert tokens.dtype == np.int32


@pytest.mark.usefixtures("books")
def test_batches_are_text_batches_and_bytes_per_token_are_counted() -> None:
    data = Austen(Words(), context=7, batch_size=3)  # type: ignore[arg-type]
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["tokens"].shape == (3, 8)
    assert batch["tokens"].dtype == torch.int64
    assert data.bytes_per_token == pytest.approx(799 / 200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"held_out": ()}, r"held_out=\[\] must name at least one of emma"),
        ({"held_out": BOOKS}, "leave one to train on"),
        ({"held_out": ("lady susan",)}, r"held_out=\['lady susan'\] must name"),
        ({"val_fraction": 1.0}, r"val_fraction=1.0 is outside \[0, 1\)"),
        ({"context": 0}, "context=0 tokens is too short"),
    ],
)
def test_impossible_settings_are_refused_at_once(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Austen(**arguments)


@pytest.mark.usefixtures("books")
def test_too_long_windows_are_refused() -> None:
    with pytest.raises(UserError, match=r"context=10000 and val_fraction=0\.0 leave a part without a window"):
        Austen(context=10_000).setup()


@pytest.mark.skipif(
    not any(Path(library, "janeaustenr").is_dir() for library in LIBRARIES), reason="r-cran-janeaustenr"
)
def test_the_novels_are_there() -> None:
    pytest.importorskip("rdata")
    data = Austen(context=1023, val_fraction=0.1)
    data.setup()
    text = bytes(data.test.windows.astype(np.uint8)).decode()
    assert text.startswith("Persuasion\n\n\nby\n\nJane Austen")
    assert 3_000_000 < data.train.windows.size < 3_400_000
