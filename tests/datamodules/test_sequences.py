"""Sets of sequences: expressions and their values, programs by file, pixels, one's own arrays, and what is held out."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.sequence.blank import BlankSequences
from lightspan.datamodules.sequence.listops import SYMBOLS, Expressions, ListOps, draw, values_of
from lightspan.datamodules.sequence.own import OwnSequences
from lightspan.datamodules.sequence.pixels import PixelSequences
from lightspan.datamodules.sequence.sets import SequenceSets


def ready(data: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        data.setup()
    return data


def rows_of(data: Any, part: str) -> set[bytes]:
    return {row.tobytes() for row in getattr(data, part).data.rows}


def value(words: Iterator[str]) -> int:
    """An evaluator of its own, by recursion."""
    word = next(words)
    if word.isdigit():
        return int(word)
    arguments: list[int] = []
    while True:
        try:
            arguments.append(value(words))
        except StopIteration:
            break
    kinds = {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda found: int(np.median(found)),
        "[SM": lambda found: sum(found) % 10,
    }
    return int(kinds[word](arguments))


class Words:
    """Ends a list at its bracket."""

    def __init__(self, words: list[str]) -> None:
        self.words = iter(words)

    def __iter__(self) -> "Words":
        return self

    def __next__(self) -> str:
        if (word := next(self.words)) == "]":
            raise StopIteration
        return word


def expressions(count: int = 300, longest: int = 200, **settings: Any) -> Expressions:
    given = {"depth": 5, "arguments": 5, "nested": 0.3} | settings
    return draw(np.random.default_rng(1), count, longest, **given)


def words_of(symbols: np.ndarray) -> list[str]:
    return [SYMBOLS[number] for number in symbols if number]


def test_each_expression_has_the_value_of_an_evaluator_of_its_own() -> None:
    drawn = expressions()
    whole = np.flatnonzero(drawn.lengths)
    assert len(whole) > 200
    kinds = set()
    for place in whole:
        words = words_of(drawn.symbols[place])
        kinds |= set(words)
        assert len(words) == drawn.lengths[place]
        assert value(Words(words)) == drawn.values[place], " ".join(words)
    assert kinds == set(SYMBOLS[1:])
    assert set(drawn.values[whole]) == set(range(10))


@pytest.mark.parametrize(("depth", "arguments"), [(1, 2), (3, 4), (6, 3)])
def test_lists_are_as_deep_and_as_long_as_was_asked_for(depth: int, arguments: int) -> None:
    drawn = expressions(depth=depth, arguments=arguments, nested=0.5)
    deepest, most, least = 0, 0, 99
    for place in np.flatnonzero(drawn.lengths):
        counts: list[int] = []
        for word in words_of(drawn.symbols[place]):
            if word == "]":
                most, least = max(most, counts[-1]), min(least, counts[-1])
                counts.pop()
            elif word.isdigit():
                counts[-1] += 1
            else:
                if counts:
                    counts[-1] += 1
                counts.append(0)
            deepest = max(deepest, len(counts))
        assert not counts
    assert (deepest, most, least) == (depth, arguments, 2)


def test_values_of_lists_by_hand() -> None:
    digits = np.array([[3, 1, 9, 0], [3, 1, 9, 0], [3, 1, 9, 0], [3, 4, 9, 9], [7, 5, 9, 2]])
    found = values_of(np.array([0, 1, 2, 3, 2]), digits, np.array([3, 3, 3, 4, 4]))
    assert found.tolist() == [1, 9, 3, 5, 6]


def listops(**settings: Any) -> ListOps:
    small = {"size": 200, "test_size": 50, "shortest": 8, "longest": 60, "depth": 4, "arguments": 4, "nested": 0.3}
    return ready(ListOps(**(small | settings)))


def test_a_larger_set_begins_with_the_smaller_one_and_all_differ() -> None:
    small, large, other = listops(), listops(size=400), listops(drawn_by=1)
    assert np.array_equal(large.train.data.rows[:200], small.train.data.rows)
    assert np.array_equal(large.test.data.rows, small.test.data.rows)
    assert not np.array_equal(other.train.data.rows, small.train.data.rows)
    assert len(rows_of(large, "train") | rows_of(large, "test")) == 450
    lengths = large.train.data.lengths
    assert lengths.min() >= 8
    assert (large.train.data.rows > 0).sum(axis=1).tolist() == lengths.tolist()
    assert [len(words_of(row)) for row in large.train.data.rows] == lengths.tolist()
    batch = next(iter(small.train_dataloader()))
    assert torch.equal(batch["mask"].bool(), batch["tokens"] > 0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"arguments": 1}, "arguments=1 at least 2"),
        ({"shortest": 70}, "shortest=70 at least 4 and at most longest=60"),
        ({"depth": 1, "arguments": 2, "longest": 4, "shortest": 4, "size": 10_000}, "found .* different expressions"),
    ],
)
def test_expressions_that_cannot_be_had_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        listops(**settings)


def test_pixels_stand_row_by_row_from_minus_1_to_1() -> None:
    data, source = ready(PixelSequences(Digits(), val_size=10)), Digits()
    images = source.load()[1].images
    first = data.test.sample(0, 0)
    expected = torch.tensor(images[0].reshape(64, 1) / 127.5 - 1, dtype=torch.float32)
    torch.testing.assert_close(first["sequence"], expected, atol=1e-6, rtol=0)
    assert (data.num_classes, first["label"].item()) == (10, source.load()[1].labels[0])
    everything = torch.stack([data.train.sample(index, 0)["sequence"] for index in range(50)])
    assert (everything.min(), everything.max()) == (-1, 1)


def own(folder: Path, rows: np.ndarray, labels: Any = None, **settings: Any) -> Any:
    labels = np.arange(len(rows)) % 2 if labels is None else labels
    np.savez(folder / "own.npz", sequences=rows, labels=np.asarray(labels))
    return ready(OwnSequences(str(folder / "own.npz"), **settings))


def test_own_values_are_standardised_by_the_sequences_trained_on_alone(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(3, 5, size=(40, 6, 2))
    rows[..., 1] = 7  # constant
    data = own(tmp_path, rows, val_size=10)
    trained = data.train.data.rows
    assert trained.dtype == np.float32
    np.testing.assert_allclose(trained[..., 0].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(trained[..., 0].std(), 1, atol=1e-6)
    assert not trained[..., 1].any()
    assert abs(float(data.val.data.rows[..., 0].mean())) > 1e-3
    assert (len(data.train), len(data.val), len(data.test), data.num_classes) == (22, 10, 8, 2)


def test_own_bytes_and_symbols(tmp_path: Path) -> None:
    rows = np.arange(80, dtype=np.uint8).reshape(20, 4)
    data = own(tmp_path, rows)
    assert torch.equal(data.train.sample(0, 0)["sequence"], torch.tensor([[0.0], [1], [2], [3]]) / 127.5 - 1)
    ends = np.array([[place + 1, 2, 0, 5, 0, 0][: 6 - place % 4] + [0] * (place % 4) for place in range(20)])
    ends[19] = 0
    data = own(tmp_path, ends, read_as="symbols", padding=0)
    batch = next(iter(data.val_dataloader()))
    lengths = batch["mask"].sum(dim=1).tolist()
    whole = [row[:length] for row, length in zip(batch["tokens"].tolist(), lengths, strict=True)]
    assert whole == [[17, 2, 0, 5], [18, 2, 0, 5], [19, 2, 0, 5], []]
    assert (batch["mask"].diff(dim=1) <= 0).all()


def test_two_arrays_and_a_test_file_of_ones_own(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(20, 5))
    np.save(tmp_path / "x.npy", rows)
    np.save(tmp_path / "y.npy", np.arange(20) % 4)
    np.savez(tmp_path / "test.npz", sequences=rows[:6], labels=np.arange(6) % 4)
    paths = [str(tmp_path / name) for name in ("x.npy", "y.npy", "test.npz")]
    data = ready(OwnSequences(*paths))
    assert (len(data.train), len(data.test), data.num_classes) == (14, 6, 4)  # equal ones are not trained on


def test_files_of_two_types_are_compared_as_one_or_refused(tmp_path: Path) -> None:
    rows = np.arange(60).reshape(20, 3)
    labels = np.arange(20) % 2
    for name, part, kind in (("train", slice(20), np.int64), ("test", slice(5), np.uint8)):
        np.savez(tmp_path / f"{name}.npz", sequences=rows[part].astype(kind), labels=labels[part])
    paths = {"path": str(tmp_path / "train.npz"), "test_path": str(tmp_path / "test.npz")}
    assert len(ready(OwnSequences(**paths, read_as="symbols")).train) == 15  # those of the test are not trained on
    with pytest.raises(UserError, match="path and test_path hold different types"):
        ready(OwnSequences(**paths))
    np.save(tmp_path / "test.npy", rows)
    with pytest.raises(UserError, match=r"data\.init_args\.test_labels=.*gone"):
        ready(OwnSequences(paths["path"], test_path=str(tmp_path / "test.npy"), test_labels=str(tmp_path / "gone.npy")))


class Unpickled:
    def __reduce__(self) -> Any:
        raise AssertionError("was unpickled")


@pytest.mark.parametrize(
    ("rows", "labels", "settings", "said"),
    [
        (np.zeros((4, 3, 2, 2)), None, {}, r"are float64 \[4, 3, 2, 2\]; values are numbers \[N, L\]"),
        (np.zeros((4, 3)), None, {"read_as": "symbols"}, r"symbols are whole numbers \[N, L\]"),
        (np.zeros((4, 3)), np.zeros(4), {}, r"labels of .* are float64 \[4\]; they must be whole numbers"),
        (np.zeros((4, 3)), [0, 1, 0], {}, "one for each of its 4 sequences"),
        (np.zeros((4, 3)), [0, -1, 0, 1], {}, "from 0 on"),
        (np.full((4, 3), np.nan), None, {}, "hold NaN, infinite"),
        (np.full((4, 3), -1), None, {"read_as": "symbols"}, "as symbols, negative numbers"),
        (np.array([[None] * 3] * 4, dtype=object), None, {}, "cannot be read as NumPy's"),
        (np.arange(12).reshape(4, 3), None, {"train_size": 9}, "ask for more than the 2"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    rows: np.ndarray, labels: Any, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        own(tmp_path, rows, labels, **settings)


@pytest.mark.parametrize("content", [b"", b"not numpy", b"PK\x03\x04 half"])
def test_broken_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "own.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read as NumPy's .npy or \.npz"):
        ready(OwnSequences(str(tmp_path / "own.npz")))
    with pytest.raises(UserError, match="cannot be read"):
        ready(OwnSequences(str(tmp_path / "gone.npz")))
    np.savez(tmp_path / "own.npz", x=np.zeros(3))
    with pytest.raises(UserError, match=r"holds x; it needs arrays sequences and labels: np.savez"):
        ready(OwnSequences(str(tmp_path / "own.npz")))


@pytest.mark.parametrize("rows", [1, 2])
def test_one_sequence_of_each_class_is_too_few(rows: int, tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", sequences=np.eye(3)[:rows], labels=np.arange(rows))
    with pytest.raises(UserError, match="more than the 0 training sequences"):
        OwnSequences(path=str(tmp_path / "few.npz")).setup()


def test_sequences_that_are_equal_to_one_held_out_are_not_trained_on(tmp_path: Path) -> None:
    rows = np.arange(60.0).reshape(20, 3)
    rows[3], rows[5] = rows[18], rows[0]  # one of the test sequences, and one for validation
    data = own(tmp_path, rows, val_size=2)
    assert len(data.train) == 16 - 2 - 2
    assert not rows_of(data, "train") & (rows_of(data, "val") | rows_of(data, "test"))


def test_blank_sequences_all_differ() -> None:
    data = ready(BlankSequences(6, 2, classes=3, size=20, val_size=6))
    assert (len(data.train), len(data.val), len(data.test)) == (14, 6, 5)
    assert len(rows_of(data, "train")) == 14
    assert all((row == row[0, 0]).all() for row in data.train.data.rows)
    with pytest.raises(UserError, match="BlankSequences length=0, channels=1"):
        BlankSequences(0)


def test_sizes_that_ask_for_too_much_are_refused() -> None:
    with pytest.raises(UserError, match="ask for more than the 1437 training sequences of PixelSequences"):
        ready(PixelSequences(Digits(), train_size=1400, val_size=100))
    assert issubclass(PixelSequences, SequenceSets)
