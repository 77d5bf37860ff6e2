"""Words: sets without a common word, letters that can be read, labels that spell them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.datamodules.rendered.words import ALPHABET, PrintedWords, WordRenderer, font_files, vocabulary

RENDERER = WordRenderer(("word", "il", "mouse"), font_files(None), 32, 96, 0.0)


def test_no_word_is_in_two_sets_and_all_are_spelt_in_letters() -> None:
    words = vocabulary(8)
    assert len(set().union(*words.values())) == sum(map(len, words.values()))
    assert min(map(len, words.values())) > 200
    assert all(2 <= len(word) <= 8 and set(word) <= set(ALPHABET) for part in words.values() for word in part)
    data = PrintedWords(size=64, val_size=32, test_size=32, longest=8)
    data.setup()
    for part, samples in zip(words, (data.train, data.val, data.test), strict=True):
        batch = samples.batch(range(32), [0] * 32)
        for row, label in zip(batch["characters"].tolist(), batch["label"].tolist(), strict=True):
            spelt = "".join(ALPHABET[c - 1] for c in row if c)
            assert spelt == words[part][label]
            assert row[len(spelt) :] == [0] * (8 - len(spelt))


def test_letters_stand_out_from_their_ground() -> None:
    printed = RENDERER.pictures(0, np.arange(60))
    for image, ink in zip(printed.images.astype(float), printed.ink, strict=True):
        letters, ground = image[:, ink > 0.95].mean(), image[:, ink < 0.05].mean()
        assert abs(letters - ground) > 40
    sides = [printed.images[i][:, printed.ink[i] > 0.95].mean() > 128 for i in range(60)]
    assert 15 < sum(sides) < 45


def test_a_word_lies_in_the_picture_and_is_as_wide_as_its_letters() -> None:
    printed = RENDERER.pictures(0, np.arange(100))
    border = np.concatenate(
        [printed.ink[:, [0, -1]].reshape(100, -1), printed.ink[:, :, [0, -1]].reshape(100, -1)], axis=1
    )
    assert (border.max(axis=1) < 0.5).mean() > 0.9
    assert (printed.ink.sum(axis=(1, 2)) > 40).all()
    ratio = {word: [] for word in RENDERER.words}
    for ink, word in zip(printed.ink, printed.words, strict=True):
        y, x = np.nonzero(ink > 0.5)
        ratio[word].append((np.ptp(x) + 1) / (np.ptp(y) + 1))
    assert np.median(ratio["il"]) < np.median(ratio["word"]) < np.median(ratio["mouse"])


def test_a_picture_has_the_same_bits_in_any_batch() -> None:
    press, numbers = RENDERER._replace(grain=0.1), np.array([3, 2**33, 0, *range(30, 70)])
    together = press.pictures(1, numbers)
    for row in (0, 1, 42):
        alone = press.pictures(1, numbers[[row]])
        assert np.array_equal(alone.images[0], together.images[row])
        assert alone.words[0] == together.words[row]


@pytest.mark.parametrize("sides", [(1, 1), (3, 40)])
def test_small_pictures_are_pictures(sides: tuple[int, int]) -> None:
    press = RENDERER._replace(height=sides[0], width=sides[1])
    assert press.pictures(0, np.arange(5)).images.shape == (5, 3, *sides)
    assert press.pictures(0, np.arange(0)).images.shape == (0, 3, *sides)


def test_numbers_and_fonts_out_of_range_are_refused(tmp_path: Path) -> None:
    for settings, said in (({"longest": 1}, "longest=1"), ({"height": 0}, "height=0"), ({"grain": -1.0}, "grain=-1.0")):
        with pytest.raises(UserError, match=said):
            PrintedWords(**settings)  # type: ignore[arg-type]
    (tmp_path / "no.ttf").write_text("no font")
    cases: list[tuple[Any, str]] = [([], r"fonts=\[\] leaves nothing"), ([str(tmp_path / "no.ttf")], "is not a font")]
    for fonts, said in cases:
        with pytest.raises(UserError, match=said):
            font_files(fonts)
