"""Words as letters: their numbers, what is left out of a list, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from lightspan.backbones.tokenizers import Letters
from lightspan.core.errors import UserError
from lightspan.datamodules.rendered.words import ALPHABET, PrintedWords
from lightspan.datamodules.text.spelling import PRINTABLE, WordList, sentences, spelled


def words_of(folder: Path, text: str, **settings: Any) -> WordList:
    (folder / "words.txt").write_text(text, encoding="utf-8")
    data = WordList(str(folder / "words.txt"), Letters(), **{"length": 30, "val_size": 1, "batch_size": 4} | settings)
    data.setup()
    return data


def test_letters_are_numbered_from_1_and_nothing_stands_behind_the_end() -> None:
    assert spelled(["cab", "", "a"], 4, "abc").tolist() == [[3, 1, 2, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert len(PRINTABLE) == 94
    with pytest.raises(UserError, match="'cabs' has 4 letters, more than longest=3"):
        spelled(["cabs"], 3, "abc")
    with pytest.raises(UserError, match="'cabs' has 's', outside of the alphabet 'abc'"):
        spelled(["cabs"], 4, "abc")


def test_lists_are_normalised_and_long_words_left_out(tmp_path: Path) -> None:
    data = words_of(tmp_path, "held\nCafé 9\n\nabcdefgh\n№!\n", longest=6)
    assert data.val.words == ["held"]
    assert data.train.words == ["Cafe9", "No!"]
    row = data.train.sample(0, 0)
    assert [PRINTABLE[number - 1] for number in row["characters"].tolist() if number] == list("Cafe9")
    read = Letters()("a photo of a 'Cafe9'")["input_ids"]
    assert row["tokens"].tolist() == read + [0] * (30 - len(read))
    assert int(row["mask"].sum()) == len(read)


def test_letters_are_tokens_and_case_is_lost() -> None:
    ids = Letters()("Ab é")["input_ids"]
    assert ids == [1, 3 + ord("a"), 3 + ord("b"), 3 + ord(" "), 2]
    assert max(Letters()("~")["input_ids"]) < Letters().vocab_size


def test_printed_words_come_with_their_sentence() -> None:
    data = PrintedWords(size=8, batch_size=4, tokenizer=Letters(), sentence="{}", length=14)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    for letters, tokens in zip(batch["characters"].tolist(), batch["tokens"].tolist(), strict=True):
        word = "".join(ALPHABET[number - 1] for number in letters if number)
        assert tokens[: len(word) + 2] == Letters()(word)["input_ids"]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'Held' has 'H', outside of the alphabet"):
        words_of(tmp_path, "a\nHeld\n", alphabet="abcdel")
    with pytest.raises(UserError, match="ask for more than the 1 words"):
        words_of(tmp_path, "a\n")
    with pytest.raises(UserError, match=r"data.init_args.path=.*none.txt is no list of words"):
        WordList(str(tmp_path / "none.txt"), Letters()).setup()
    for settings, message in (
        ({"alphabet": "aa"}, "alphabet='aa' must name"),
        ({"longest": 0}, "longest=0"),
        ({"sentence": "a word"}, r"sentence='a word' needs one \{\}"),
    ):
        with pytest.raises(UserError, match=message):
            WordList("words.txt", Letters(), **settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="sentence"):
        PrintedWords(sentence="{} {}")
    assert sentences(["it"], "a '{}'") == ["a 'it'"]
