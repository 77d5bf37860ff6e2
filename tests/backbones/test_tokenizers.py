from pathlib import Path

import pytest

from lightspan.backbones.tokenizers import HashedWords, stored_tokenizer
from lightspan.core.errors import UserError


def test_a_text_is_start_words_end_whatever_its_case_and_punctuation() -> None:
    words = HashedWords(4096)
    ids = words("A red circle.")["input_ids"]
    assert ids[0] == 1
    assert ids[-1] == 2
    assert ids == words("a RED, circle!")["input_ids"]
    assert words("red a circle")["input_ids"][1:3] == [ids[2], ids[1]]
    assert all(3 <= number < 4096 for number in ids[1:-1])


def test_texts_are_cut_and_padded_at_the_end_and_keep_their_end() -> None:
    read = HashedWords()(
        ["a b c d e f", "a", ""], truncation=True, max_length=5, padding="max_length", padding_side="right"
    )
    assert [row[-1] for row in read["input_ids"]] == [2, 0, 0]
    assert read["input_ids"][1][1:] == [read["input_ids"][0][1], 2, 0, 0]
    assert read["attention_mask"] == [[1] * 5, [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]


def test_a_word_has_the_same_number_on_every_machine() -> None:
    assert HashedWords(8192)("red circle", add_special_tokens=False)["input_ids"] == [6884, 6282]


def test_too_few_numbers_and_absent_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"size=3 leaves no number for words"):
        HashedWords(3)
    with pytest.raises(UserError, match=r"there is no tokenizer in .*absent"):
        stored_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"has no tokenizer that transformers can read"):
        stored_tokenizer(str(tmp_path))
