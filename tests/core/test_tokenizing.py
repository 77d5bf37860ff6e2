"""Tokenizers of others on texts of others: one UserError for whatever goes wrong, and no text beyond the limit."""

from contextlib import nullcontext

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lightspan.core import tokenizing
from lightspan.core.errors import UserError
from lightspan.core.files.foreign import CHARACTERS
from lightspan.core.tokenizing import cut


def of_letters(expression: str = "a") -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(expression), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_all_characters_that_are_cut_at_once_count(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = of_letters()
    monkeypatch.setenv(CHARACTERS.setting, "4")
    assert cut(tokenizer, "aaaa")["input_ids"] == [0] * 4
    assert cut(tokenizer, ["a", "aa"], ["a", ""])["input_ids"] == [[0, 0], [0, 0]]
    for texts in (("aaaaa",), (["a" * 3, "aa"],), (["a" * 3], ["aa"])):
        with pytest.raises(UserError, match=r"it has 5 characters.*LIGHTSPAN_MAX_CHARACTERS"):
            cut(tokenizer, *texts)


def test_raising_the_limit_of_characters_is_enough_and_not_the_only_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"one JSON object a line.*{CHARACTERS.setting}"):
        cut(of_letters(), "a" * (CHARACTERS.default + 1))
    shares = list[float]()
    monkeypatch.setattr(tokenizing, "bounded_time", lambda share: (shares.append(share), nullcontext())[1])
    monkeypatch.setenv(CHARACTERS.setting, str(3 * CHARACTERS.default))
    for length in (1, CHARACTERS.default, 3 * CHARACTERS.default):
        cut(len, "a" * length)
    assert shares == [1, 1, 3]


def test_whatever_a_tokenizer_raises_is_one_error_also_a_panic_of_rust() -> None:
    with pytest.raises(UserError, match="retry-limit"):
        cut(of_letters(r"(a|aa)+\$"), "a" * 64)
    with pytest.raises(UserError, match="padding token"):
        cut(of_letters(), ["a", "aa"], padding=True)


def test_a_panic_alone_is_taken_for_an_error() -> None:
    def stopped(*texts: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut(stopped, "a")
