"""Pairs of texts and whole words: what is read, what is held out, what a seed draws, and which lines are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_files import partial_shard
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightspan.backbones.tokenizers import HashedWords
from lightspan.backbones.trained_tokenizers import trained_tokenizer
from lightspan.core.errors import UserError
from lightspan.datamodules.loading.sample_sets import held_out_size
from lightspan.datamodules.shards.texts import QueryShards, WholeWordShards
from lightspan.datamodules.text.functions import library_functions, split_names
from lightspan.datamodules.text.pairs import LibraryPairs, Pair, Pairs, ScoredPairs, TextPairs, pair_of
from lightspan.datamodules.text.tokenized import tokenized
from lightspan.datamodules.text.whole_words import WholeWords, WholeWordSamples, WordCutter
from lightspan.datamodules.text.windows import in_validation

SOURCE = '''
class Reader:
    async def read_it(self, myFile):
        """
        Reads a whole file.

        More is said here.
        """
        first = myFile.read()
        return first

    def undocumented(self):
        return 1

    def short(self):
        """Too short."""
        return 2

    def empty(self):
        """Has nothing but this docstring."""

def again():
    "Reads a whole file."
    return 3
'''


def python_files(folder: Path, count: int = 12) -> str:
    for number in range(count):
        source = f'def f():\n    """Gives back number {number} alone."""\n    return {number}\n'
        (folder / f"file_{number}.py").write_text(source)
    (folder / "broken.py").write_text("def (")
    return str(folder)


def test_a_form_feed_ends_no_line_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        'x = 1\n\x0c\ndef f():\n    """Gives back the number one."""\n    y = "\x0c"\n    return 1\n'
    )
    (found,) = library_functions(str(tmp_path))
    assert found.body == 'y = "\x0c"\n    return 1'


def test_a_text_of_a_file_may_hold_what_ends_a_line_for_python(tmp_path: Path) -> None:
    text = "one \u2028 two \u0085 three"
    rows = [{"text": f"{text} {n}", "query": text, "document": text} for n in range(20)]
    (tmp_path / "a.jsonl").write_text(
        "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    pairs = TextPairs(str(tmp_path / "a.jsonl"), HashedWords(64), val_size=3)
    pairs.setup()
    assert (len(pairs.train), len(pairs.val)) == (17, 3)  # type: ignore[arg-type]
    words = WholeWords(HashedWords(64), str(tmp_path / "a.jsonl"), length=8, val_fraction=0.5)
    words.setup()
    assert len(words.train) + len(words.val) == 20  # type: ignore[arg-type]


def test_functions_are_first_lines_of_docstrings_and_bodies_each_once(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (")
    (found,) = library_functions(str(tmp_path))
    assert found == ("a.py", "Reads a whole file.", "first = my File.read()\n        return first")
    assert split_names("HTTPServer2Go x_y") == "HTTPServer2 Go x y"
    (tmp_path / "a.py").unlink()
    with pytest.raises(UserError, match="no Python file with a documented function"):
        library_functions(str(tmp_path))


def test_files_are_held_out_as_a_whole(tmp_path: Path) -> None:
    data = LibraryPairs(HashedWords(), python_files(tmp_path), val_fraction=0.4, batch_size=2)
    data.setup()
    held = {n for n in range(12) if in_validation(f"file_{n}.py", 0.4)}
    assert 0 < len(held) < 12
    assert (len(data.train), len(data.val)) == (12 - len(held), len(held))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="of the functions 12 are to train on and 0 to validate on"):
        LibraryPairs(HashedWords(), str(tmp_path), val_fraction=1e-9).setup()


def write(folder: Path, lines: list[Any]) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("\n\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


PAIRS = [{"query": f"question {n}", "document": f"answer {n}", "negatives": [f"no {n}", "never"]} for n in range(6)]


def test_a_query_has_its_document_first_and_then_negatives_that_its_seed_draws(tmp_path: Path) -> None:
    tokenizer = HashedWords()
    data = TextPairs(write(tmp_path, PAIRS), tokenizer, val_size=1, negatives=3, batch_size=2)
    data.setup()
    assert data.train is not None
    first = data.train.sample(0, 5)
    words = {text: tokenizer(text)["input_ids"] for text in ("answer 1", "no 1", "never", "question 1")}
    rows = [
        tokens[mask == 1].tolist()
        for tokens, mask in zip(first["document_tokens"], first["document_mask"], strict=True)
    ]
    assert first["tokens"][first["mask"] == 1].tolist() == words["question 1"]
    assert rows[0] == words["answer 1"]
    assert all(row in (words["no 1"], words["never"]) for row in rows[1:])
    assert torch.equal(first["document_tokens"], data.train.sample(0, 5)["document_tokens"])
    assert len({data.train.sample(0, seed)["document_tokens"].numpy().tobytes() for seed in range(9)}) > 1
    assert data.val.sample(0, 0)["document_tokens"].shape[0] == 1
    assert "score" not in first


@pytest.mark.parametrize(("lines", "held"), [(2, 1), (19, 1), (40, 4)])
def test_a_tenth_of_the_pairs_is_held_out(lines: int, held: int, tmp_path: Path) -> None:
    data = TextPairs(write(tmp_path, [{"query": f"q {n}", "document": f"d {n}"} for n in range(lines)]), HashedWords())
    data.setup()
    assert (len(data.train), len(data.val)) == (lines - held, held)  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "most", "held"), [(None, 1000, 1000), (None, 200, 200), (3, 2, 3)])
def test_no_more_is_held_out_of_a_large_file_unless_it_is_asked_for(size: int | None, most: int, held: int) -> None:
    assert held_out_size(size, 123_456, most) == held


def test_scores_and_a_file_to_validate_on(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    lines = [pair | {"score": n / 2} for n, pair in enumerate(PAIRS)]
    path, val = write(tmp_path, lines), write(tmp_path / "val", lines[:2])
    data = ScoredPairs(path, HashedWords(), val_path=val, batch_size=6)
    data.setup()
    (batch,) = data.train_dataloader()
    assert torch.equal(batch["score"], batch["index"] / 2)
    assert (len(data.train), len(data.val)) == (6, 2)  # type: ignore[arg-type]


BAD: list[tuple[list[Any], Callable[..., Any], str]] = [
    (["{"], TextPairs, "line 1 is not JSON"),
    ([PAIRS[0], {"query": " ", "document": "a"}], TextPairs, "line 3 has no query, or an empty one"),
    ([{"query": "a"}], TextPairs, "line 1 has no document"),
    ([["a", "b"]], TextPairs, "line 1 has no query"),
    ([PAIRS[0] | {"negatives": [""]}], TextPairs, "negatives must be a list of texts"),
    ([{"query": "a", "document": "b"}], lambda *a: TextPairs(*a, negatives=1), "has no negatives"),
    ([PAIRS[0] | {"score": "high"}], ScoredPairs, "has no score that is a finite number"),
    ([PAIRS[0] | {"score": float("nan")}], ScoredPairs, "has no score that is a finite number"),
    ([PAIRS[0] | {"score": 1e300}], ScoredPairs, "has no score that is a finite number of 32 bits"),
    ([PAIRS[0] | {"score": 10**400}], ScoredPairs, "has no score that is a finite number of 32 bits"),
    ([], TextPairs, "has no pair"),
    ([PAIRS[0]], TextPairs, "ask for more than the 1 pairs"),
]


@pytest.mark.parametrize(("lines", "kind", "said"), BAD)
def test_lines_that_are_no_pairs_are_refused_by_number(lines: list[Any], kind: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        kind(write(tmp_path, lines), HashedWords()).setup()


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for make, said in (
        (lambda: LibraryPairs(HashedWords(), val_fraction=0), "val_fraction=0"),
        (lambda: TextPairs("x", HashedWords(), val_size=0), "val_size=0"),
        (lambda: TextPairs("x", HashedWords(), query_length=2), "length=2"),
        (lambda: ScoredPairs("x", HashedWords(), negatives=1), "negatives=1"),
        (lambda: TextPairs(str(tmp_path / "none"), HashedWords()).setup(), "cannot be read"),
        (lambda: WholeWords(HashedWords(), path="x", folder="y"), "path=x and folder=y"),
        (lambda: QueryShards(["x.tar"], HashedWords(), negatives=-1), "negatives=-1"),
    ):
        with pytest.raises(UserError, match=said):
            make()
    assert pair_of("here", PAIRS[0], 1) == Pair("question 0", "answer 0", ("no 0", "never"))
    assert not len(Pairs.samples(LibraryPairs(HashedWords()), []))


def pieces() -> PreTrainedTokenizerFast:
    """WordPiece of three words, one of which has two pieces, with special tokens around a text."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "un": 4, "##der": 5, "stand": 6}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def test_pieces_of_a_word_have_its_number_and_special_tokens_none() -> None:
    cutter = WordCutter(pieces(), 8)
    sample = cutter.cut(*cutter.tokens_and_words("stand under stand"), seed=0)
    assert sample["tokens"].tolist() == [2, 6, 4, 5, 6, 3, 0, 0]
    assert sample["word"].tolist() == [-1, 0, 1, 1, 2, -1, -1, -1]
    assert sample["mask"].tolist() == [1] * 6 + [0] * 2


def test_of_a_long_text_a_part_is_read_that_its_seed_draws() -> None:
    cutter = WordCutter(HashedWords(), 7)
    read = cutter.tokens_and_words(" ".join(f"w{n}" for n in range(40)))
    cuts = [cutter.cut(*read, seed=seed) for seed in range(30)]
    assert all(cut["mask"].all() and cut["tokens"].shape == (7,) for cut in cuts)
    firsts = {int(cut["word"][1]) for cut in cuts}
    assert len(firsts) > 10
    assert max(firsts) <= 35
    assert all(torch.equal(cut["word"][1:-1], torch.arange(5) + cut["word"][1]) for cut in cuts)
    with pytest.raises(UserError, match="length=2"):
        WordCutter(HashedWords(), 2)


def test_each_sample_of_whole_words_is_its_own_text() -> None:
    cutter, texts = WordCutter(HashedWords(), 9), ["one two", "three", "four five six", "seven"]
    samples = WholeWordSamples(texts, cutter)
    for index, text in enumerate(texts):
        sample = samples.sample(index, 0)
        assert sample["tokens"][sample["mask"] == 1].tolist() == HashedWords()(text)["input_ids"]
        assert sample["index"] == index


def test_whole_words_come_from_lines_or_from_functions(tmp_path: Path) -> None:
    data = WholeWords(HashedWords(), folder=python_files(tmp_path), val_fraction=0.4, length=9)
    data.setup()
    assert len(data.train) + len(data.val) == 12  # type: ignore[arg-type]
    path = write(tmp_path, [{"text": f"line number {n}"} for n in range(20)])
    data = WholeWords(HashedWords(), path=path, val_fraction=0.4, batch_size=4)
    data.setup()
    assert len(data.train) + len(data.val) == 20  # type: ignore[arg-type]
    for line in ({"text": ""}, {"words": "a"}, "["):
        with pytest.raises(UserError, match="line 1"):
            WholeWords(HashedWords(), path=write(tmp_path, [line])).setup()


def test_shards_of_pairs_and_of_texts_give_what_files_do_and_name_what_they_cannot_read(tmp_path: Path) -> None:
    shard = partial_shard(tmp_path / "q.tar", [{"json": json.dumps(pair)} for pair in PAIRS])
    data = QueryShards([shard], HashedWords(), [shard], negatives=2, batch_size=6)
    data.setup()
    (batch,) = data.train_dataloader()
    assert batch["document_tokens"].shape == (6, 3, 196)
    assert next(iter(data.val_dataloader()))["document_tokens"].shape[1] == 1  # type: ignore[call-overload]
    assert data.stand_in() is None
    empty = partial_shard(tmp_path / "e.tar", [{"json": '{"query": "", "document": "b"}', "txt": " "}])
    for made, said in (
        (QueryShards([empty], HashedWords(), batch_size=1), "sample 0000 has no query"),
        (WholeWordShards([empty], HashedWords(), batch_size=1), "sample 0000 is an empty text"),
    ):
        made.setup()
        with pytest.raises(UserError, match=said):
            next(iter(made.train_dataloader()))
    for absent in (QueryShards(["none.tar"], HashedWords()), WholeWordShards(["none.tar"], HashedWords(), length=9)):
        stand_in = absent.stand_in()
        assert stand_in is not None
        assert len(stand_in["tokens"]) == 2


def test_special_tokens_stand_around_a_text_as_its_tokenizer_has_them() -> None:
    tokenizer = trained_tokenizer(["some words of a text"] * 9, 280)
    for single, before, after in (("<start> $A <end>", [1], [2]), ("$A <end>", [], [2]), ("$A", [], [])):
        special = [(token, number) for number, token in ((1, "<start>"), (2, "<end>")) if token in single]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special
        )
        cutter = WordCutter(tokenizer, 12)
        assert (cutter.before, cutter.after) == (before, after)
        row = cutter.cut(*cutter.tokens_and_words("some words"), seed=0)
        assert row["tokens"][row["mask"] == 1].tolist() == tokenizer("some words")["input_ids"]


def test_words_that_look_like_a_special_token_are_text() -> None:
    for tokenizer in (trained_tokenizer(["some <pad> <mask>"] * 9, 280), HashedWords(64)):
        special = set(tokenizer.all_special_ids)
        tokens, words = WordCutter(tokenizer, 12).tokens_and_words("<mask> <pad>")
        assert len(tokens)
        assert not special & set(tokens.tolist())
        assert (words >= 0).all()
        row, mask = tokenized(tokenizer, ["<mask> <pad>"], 32)
        assert special & set(row[mask == 1][1:-1].tolist()) == set()
        assert mask.sum() > 3
