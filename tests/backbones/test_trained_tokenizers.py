"""Tokenizers that are trained on texts: every text comes back, and the same texts give the same tokenizer."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightspan.backbones.tokenizers import stored_tokenizer
from lightspan.backbones.trained_tokenizers import SPECIAL, Kind, trained_tokenizer
from lightspan.core.errors import UserError

TEXTS = [
    "".join(f"{verb}{end} " for verb in ("walk", "talk", "look", "paint", "train") for end in ("", "s", "ed", "ing"))
    * 9,
    "naïve 日本語 🙂",
    "",
]
KINDS: tuple[Kind, ...] = ("bpe", "unigram") if find_spec("sentencepiece") else ("bpe",)
TRAINED = {kind: trained_tokenizer(TEXTS, 290, kind) for kind in KINDS}


def test_sentence_piece_is_here_to_train_unigram_tokenizers() -> None:
    pytest.importorskip("sentencepiece", reason="the extra `text` is not installed")
    assert KINDS == ("bpe", "unigram")


@given(st.text(max_size=40), st.sampled_from(KINDS))
def test_every_text_comes_back_as_it_was(text: str, kind: Kind) -> None:
    ids = TRAINED[kind](text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert TRAINED[kind].decode(ids) == text
    assert all(len(SPECIAL) <= number < 290 for number in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_is_frequent_and_keeps_its_size(kind: Kind) -> None:
    assert len(TRAINED[kind]) <= 290
    assert len(TRAINED[kind].tokenize("walking paints looked")) < 12
    assert len(TRAINED[kind].tokenize("zyx wvu")) == 7
    assert len(trained_tokenizer(TEXTS, 260, kind)) == 260
    given_, mask = TRAINED[kind]("walk"), TRAINED[kind].mask_token_id
    assert (given_["input_ids"][0], given_["input_ids"][-1], mask) == (1, 2, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_stored_as_a_folder_of_transformers(kind: Kind, tmp_path: Path) -> None:
    TRAINED[kind].save_pretrained(tmp_path)
    read = stored_tokenizer(str(tmp_path))
    assert read.get_vocab() == TRAINED[kind].get_vocab()
    assert read("the naïve walk")["input_ids"] == TRAINED[kind]("the naïve walk")["input_ids"]
    assert read.is_fast


PROGRAM = """
from lightspan.backbones.trained_tokenizers import trained_tokenizer
texts = ["".join(chr(97 + (i * j) %% 23) + " " * (j %% 3 == 0) for j in range(400)) for i in range(9)]
for kind in %r:
    print(trained_tokenizer(texts, 400, kind).backend_tokenizer.to_str())
"""


@pytest.mark.runs
def test_two_processes_train_the_same_tokenizer_to_the_last_bit() -> None:
    said = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM % (KINDS,)], capture_output=True, check=True, env={"PYTHONHASHSEED": str(i)}
        )
        for i in range(2)
    ]
    assert len(said[0].stdout) > 5_000 * len(KINDS)
    assert said[0].stdout == said[1].stdout


def test_a_model_of_sentence_piece_is_read_with_its_own_pieces(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="the extra `text` is not installed")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].split()),
        model_prefix=str(tmp_path / "words"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file = str(tmp_path / "words.model")
    ids = stored_tokenizer(file)("walk and look", add_special_tokens=False)["input_ids"]
    assert ids == sentencepiece.SentencePieceProcessor(model_file=file).encode("walk and look")
    Path(file).write_bytes(b"no model")
    with pytest.raises(UserError, match="no model of SentencePiece"):
        stored_tokenizer(file)


def test_sizes_and_texts_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"size=259 has no room for 256 bytes.*260"):
        trained_tokenizer(TEXTS, 259)
    for kind in KINDS:
        with pytest.raises(UserError, match="no text to train a tokenizer on"):
            trained_tokenizer(["", ""], 300, kind)
    monkeypatch.setattr("lightspan.backbones.trained_tokenizers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .*\[text\]"):
        trained_tokenizer(TEXTS, 300, "unigram")
