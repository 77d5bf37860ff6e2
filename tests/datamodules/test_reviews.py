"""Food reviews: splits, padding and masks, and the real set where it is installed."""

from pathlib import Path

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.loading.sample_sets import spaced
from lightspan.datamodules.r_data import LIBRARIES
from lightspan.datamodules.text import reviews
from lightspan.datamodules.text.reviews import FoodReviews


class Letters:
    """Stands for a tokenizer: one token a letter between 1 and 2, padded with 0."""

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 2

    def __call__(
        self, texts: list[str], truncation, max_length: int, padding: str, padding_side: str, split_special_tokens: bool
    ) -> dict:
        rows = [[1, *(ord(letter) for letter in text[: max_length - 2]), 2] for text in texts]
        return {
            "input_ids": [row + [0] * (max_length - len(row)) for row in rows],
            "attention_mask": [[1] * len(row) + [0] * (max_length - len(row)) for row in rows],
        }


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 training reviews, of which one stands twice and one among the 20 test reviews; every fourth is great."""
    pandas = pytest.importorskip("pandas")
    words = [f"review {i}" for i in range(100)]
    words[7], words[9] = words[3], "test 5"
    scores = ["great" if i % 4 == 0 else "other" for i in range(100)]
    sides = [(words, scores), ([f"test {i}" for i in range(20)], scores[:20])]
    made = [pandas.DataFrame({"review": texts, "score": pandas.Categorical(given)}) for texts, given in sides]
    monkeypatch.setattr(reviews, "read_r_data", lambda package, names, library: made)


def data(**settings) -> FoodReviews:
    made = FoodReviews(Letters(), **({"length": 12, "batch_size": 4} | settings))  # type: ignore[arg-type]
    made.setup()
    return made


def tokens_of(loader) -> set[tuple[int, ...]]:
    return {tuple(row) for batch in loader for row in batch["tokens"].tolist()}


@pytest.mark.usefixtures("frames")
def test_reviews_that_stand_twice_or_in_the_test_set_are_not_trained_on() -> None:
    made = data()
    assert len(made.train) == 98
    bank, test = tokens_of(made.bank_dataloader()), tokens_of(made.test_dataloader())
    assert len(bank) == 98
    assert len(test) == 20
    assert not bank & test
    assert tokens_of(made.val_dataloader()) == test


@pytest.mark.usefixtures("frames")
def test_validation_reviews_are_kept_out_of_training_and_sizes_hold() -> None:
    made, whole = data(val_size=10, train_size=30), data()
    bank, held_out = tokens_of(made.bank_dataloader()), tokens_of(made.val_dataloader())
    assert (len(bank), len(held_out), len(made.train)) == (30, 10, 30)
    assert not bank & held_out
    assert bank | held_out <= tokens_of(whole.bank_dataloader())
    assert tokens_of(made.test_dataloader()) == tokens_of(whole.test_dataloader())


@pytest.mark.usefixtures("frames")
def test_a_batch_holds_what_its_type_says() -> None:
    batch = next(iter(data(length=9).train_dataloader()))
    assert {name: tuple(t.shape) for name, t in batch.items()} == {
        "tokens": (4, 9),
        "mask": (4, 9),
        "label": (4,),
        "index": (4,),
    }
    assert {t.dtype for t in batch.values()} == {torch.int64}
    assert torch.equal(batch["mask"].bool(), batch["tokens"] != 0)
    batches = list(data().bank_dataloader())
    assert torch.cat([b["index"] for b in batches]).tolist() == list(range(98))
    assert sum(int(b["label"].sum()) for b in batches) == 25


def test_spaced_indices_are_distinct_and_even() -> None:
    import numpy as np

    chosen = spaced(np.arange(100), 30)
    assert len(set(chosen.tolist())) == 30
    assert set(np.diff(chosen)) <= {3, 4}
    assert spaced(np.arange(5), 0).size == 0


@pytest.mark.usefixtures("frames")
def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError, match="length=2 leaves no room"):
        data(length=2)
    with pytest.raises(UserError, match="val_size=-1 is negative; 0 validates on the test samples"):
        data(val_size=-1)
    with pytest.raises(UserError, match="train_size=90 and val_size=20 ask for more than the 98 training"):
        data(train_size=90, val_size=20)


@pytest.mark.skipif(not any(Path(library, "modeldata").is_dir() for library in LIBRARIES), reason="r-cran-modeldata")
def test_the_reviews_are_there() -> None:
    pytest.importorskip("rdata")
    made = FoodReviews(Letters(), length=40)  # type: ignore[arg-type]
    made.setup()
    assert (len(made.train), len(made.test)) == (3973, 1000)
    assert made.test.data.labels.sum() == 658
