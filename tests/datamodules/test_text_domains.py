"""Texts of two domains: one prompt in both stages, which words are hidden, and labels that nobody can reach."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightspan.backbones.tokenizers import HashedWords
from lightspan.core.errors import UserError
from lightspan.datamodules.text.denoising import appended, restored
from lightspan.datamodules.text.domains import (
    DomainDenoising,
    DomainFiles,
    DomainPrompts,
    Prompt,
    PromptReader,
    UnlabelledTexts,
)
from lightspan.datamodules.text.drawn_reviews import AFTERWARDS, WORDS, DrawnReviews
from lightspan.datamodules.text.word_choices import (
    InformativeWords,
    RandomWords,
    UninformativeWords,
    label_information,
    plain_word,
)

TOKENIZER = HashedWords(4096)


def reader(length: int = 20, template: str = "Review: {} Sentiment:") -> PromptReader:
    return PromptReader(TOKENIZER, Prompt(template), length, None)


def own(tokens: Any, segments: Any) -> list[int]:
    return tokens[segments > 0].tolist()


def test_a_prompt_with_nothing_hidden_is_the_same_in_both_stages() -> None:
    made, text = reader(), reader().words("the plot is dull and the ending is moving")
    shown, segments = made.shown(text)
    row = made.hidden(text, RandomWords(0.3), np.random.default_rng(0))
    again = restored(row["inputs"].numpy(), row["targets"].numpy(), made.tokens)
    assert [*again.tolist(), made.tokens.eos] == own(shown, segments)
    before, after = (part.tokens.tolist() for part in made.around)
    kept = own(row["inputs"], row["input_segments"])
    assert kept[: len(before)] == before
    assert kept[-len(after) - 1 : -1] == after


def test_hidden_words_are_whole_and_their_sentinels_stand_in_their_place() -> None:
    made, text = reader(), reader().words("a b c d e f g h i j")
    for seed in range(20):
        row = made.hidden(text, RandomWords(0.3), np.random.default_rng(seed))
        said = own(row["targets"], row["target_segments"])
        sentinels = [token for token in said if token >= 4096 and token != made.tokens.eos]
        assert len(said) - len(sentinels) - 1 == 3
        assert said[-1] == made.tokens.eos
        assert row["decoder_inputs"][0] == made.tokens.pad
        assert torch.equal(row["decoder_inputs"][1 : len(said)], row["targets"][: len(said) - 1])


TEXTS = [["good", "plot", "the"], ["good", "ending", "the"], ["bad", "plot", "the"], ["bad", "ending", "the"]] * 3
LABELS = [1, 1, 0, 0] * 3


def test_information_is_by_hand_the_logarithm_of_a_ratio_of_shares() -> None:
    found = label_information(TEXTS, LABELS)
    assert found["good"] == pytest.approx(np.log(0.5 / (0.5 * 0.5)))
    assert found["plot"] == found["the"] == pytest.approx(0)
    assert "rare" not in label_information([*TEXTS, ["rare"]], [*LABELS, 1])
    twice = label_information([["a", "a"]] * 3 + [["b"]] * 3, [0, 0, 1, 1, 1, 1])
    assert twice["a"] == pytest.approx(np.log((2 / 6) / (3 / 6 * 2 / 6)))
    # A word that one text repeats is in one text: too rare, and no more often beside that text's label.
    assert "a" not in label_information([["a", "a", "a"], ["b"]], [0, 1])
    often = label_information([["a", "a", "a"], ["a"], ["a"], ["b"]], [0, 1, 1, 1])
    assert often["a"] == pytest.approx(np.log((1 / 4) / (3 / 4 * 1 / 4)))


def test_informative_and_uninformative_words_are_equally_many_and_other_ones() -> None:
    words = ["the", "good", "plot", "unseen", "the", "ending", "bad", "other", "new", "words"]
    taken = {}
    for kind in (InformativeWords, UninformativeWords, RandomWords):
        choice = kind(0.2)
        choice.learn(TEXTS, LABELS)
        drawn = [choice.places(words, np.random.default_rng(seed)) for seed in range(30)]
        assert {len(places) for places in drawn} == {2}
        taken[kind] = {words[place] for places in drawn for place in places}
    assert taken[InformativeWords] == {"good", "bad"}
    assert taken[UninformativeWords] == {"the", "plot", "ending"}  # unknown words come last
    assert len(taken[RandomWords]) == 9
    choice = InformativeWords(0.5)
    choice.learn(TEXTS, LABELS)
    assert len(choice.places(["unseen"], np.random.default_rng(0))) == 1
    assert plain_word('"Good!"') == "good"
    assert choice.places(["the", '"Good!"', "THE", "Bad,"], np.random.default_rng(0)).tolist() == [1, 3]
    # Rounded, and one at least.
    assert [RandomWords(0.15).count(words) for words in (1, 2, 9, 11, 12, 20)] == [1, 1, 1, 2, 2, 3]


def test_no_label_of_the_target_can_be_reached_while_a_network_learns(tmp_path: Path) -> None:
    for domains in (DrawnReviews(20, 5), files(tmp_path)):
        with pytest.raises(UserError, match="texts of the target domain have no labels to learn from"):
            _ = domains.target().labels
    for kind in (DomainPrompts, DomainDenoising):
        hidden = without_test(files(tmp_path))
        data = kind(hidden, TOKENIZER, val_size=2, batch_size=4)
        data.setup("fit")
        assert list(data.train_dataloader())
        assert list(data.val_dataloader())
    untested = DomainFiles(str(tmp_path / "source.jsonl"), str(tmp_path / "target.jsonl"))
    with pytest.raises(UserError, match="there are no labels of the target domain to judge by"):
        DomainPrompts(untested, TOKENIZER).test_dataloader()


def without_test(domains: DomainFiles) -> DomainFiles:
    """Whose labels cannot even be read."""
    domains.target_test = lambda: pytest.fail("the labels of the target were read")  # type: ignore[method-assign]
    return domains


def files(folder: Path, **other: list[Any]) -> DomainFiles:
    rows: dict[str, list[Any]] = {
        "source": [{"text": f"good book {n}", "label": n % 2} for n in range(10)],
        "target": [{"text": f"sharp knife {n}", "label": "not read"} for n in range(8)],
        "test": [{"text": f"blunt knife {n}", "label": n % 2} for n in range(6)],
    } | other
    for name, told in rows.items():
        lines = [line if isinstance(line, str) else json.dumps(line) for line in told]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return DomainFiles(*(str(folder / f"{name}.jsonl") for name in rows))


def test_the_source_is_divided_and_the_test_is_the_targets(tmp_path: Path) -> None:
    data = DomainPrompts(files(tmp_path), TOKENIZER, val_size=2, batch_size=4)
    data.setup()
    assert (len(data.train), len(data.val)) == (8, 2)  # type: ignore[arg-type]
    first, second = data.test_dataloader()
    assert [*first["label"].tolist(), *second["label"].tolist()] == [0, 1, 0, 1, 0, 1]
    assert "target_inputs" not in first
    alone = DomainDenoising(files(tmp_path), TOKENIZER, source_alone=True, val_size=2, batch_size=4)
    both = DomainDenoising(files(tmp_path), TOKENIZER, val_size=2, batch_size=4)
    for data, count in ((alone, 8), (both, 16)):
        data.setup()
        assert len(data.train) == count  # type: ignore[arg-type]
    hidden = data.train.sample(9, 3)  # type: ignore[union-attr]
    assert torch.equal(hidden["inputs"], data.train.sample(9, 3)["inputs"])  # type: ignore[union-attr]


def test_predictions_are_for_the_raw_texts_of_the_target_in_the_order_of_their_file(tmp_path: Path) -> None:
    domains = files(tmp_path)
    data = DomainPrompts(domains, TOKENIZER, val_size=2, batch_size=3)
    batches = list(data.predict_dataloader())
    shown = torch.stack([data.reader.shown(words)[0] for words in data.read(domains.target().texts)])
    assert torch.equal(torch.cat([batch["inputs"] for batch in batches]), shown)
    assert not any("label" in batch for batch in batches)


def test_validation_has_the_shares_of_all_labels_whatever_their_order() -> None:
    data = DomainPrompts(DrawnReviews(40, 5), TOKENIZER, val_size=10, batch_size=4)  # labels take turns in these
    data.setup()
    labels = [int(data.val.sample(place, 0)["label"]) for place in range(10)]  # type: ignore[union-attr]
    assert sum(labels) == 5


def test_the_first_stage_reads_both_domains_and_ranks_words_by_what_is_trained_on(tmp_path: Path) -> None:
    class Told(RandomWords):
        def learn(self, texts: Any, labels: Any) -> None:
            self.told = list(zip(map(" ".join, texts), labels, strict=True))

    hide = Told(0.3)
    data = DomainDenoising(files(tmp_path), TOKENIZER, hide, val_size=2, batch_size=4)
    data.setup()
    read, held = ([" ".join(words.words) for words in side.texts] for side in (data.train, data.val))  # type: ignore
    assert read[8:] == [f"sharp knife {n}" for n in range(8)]
    assert sorted([*read[:8], *held]) == [f"good book {n}" for n in range(10)]
    assert hide.told == [(text, int(text[-1]) % 2) for text in read[:8]]
    loud = [{"text": f'"Good!" Book {n}', "label": n % 2} for n in range(10)]
    DomainDenoising(files(tmp_path, source=loud), TOKENIZER, hide, val_size=2, batch_size=4).setup()
    assert {text.rpartition(" ")[0] for text, _ in hide.told} == {"good book"}


def test_each_epoch_puts_another_text_of_the_target_beside_one_of_the_source(tmp_path: Path) -> None:
    data = DomainPrompts(files(tmp_path), TOKENIZER, val_size=2, batch_size=4)
    data.setup()
    drawn = {tuple(data.train.sample(0, seed)["target_inputs"].tolist()) for seed in range(60)}  # type: ignore
    assert drawn == {tuple(data.reader.shown(data.reader.words(f"sharp knife {n}"))[0].tolist()) for n in range(8)}
    assert not any(name.startswith("target_") for side in (data.bank, data.val) for name in side.sample(0, 0))


def test_a_text_may_hold_what_ends_a_line_for_python(tmp_path: Path) -> None:
    text = "good book \u2028 and \u0085 more"
    (tmp_path / "target.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    path = str(tmp_path / "target.jsonl")
    assert DomainFiles(path, path).target().texts == [text]


def test_a_text_that_may_have_more_spans_than_there_are_sentinels_is_refused(tmp_path: Path) -> None:
    long = {"source": [{"text": " ".join(f"word{n}" for n in range(30)), "label": n % 2} for n in range(6)]}
    numbers = appended(len(TOKENIZER), 8)
    for rate, fits in ((0.25, True), (0.5, False), (0.9, True)):  # at 0.9 seen words divide them into few spans
        data = DomainDenoising(
            files(tmp_path, **long), TOKENIZER, RandomWords(rate), val_size=2, batch_size=4, tokens=numbers
        )
        if fits:
            data.setup()
            assert list(data.train_dataloader())
        else:
            with pytest.raises(UserError, match="in a text of 30, in up to 15 spans, and there are 8"):
                data.setup()


def test_choices_are_the_words_of_all_labels_behind_what_begins_them() -> None:
    made = PromptReader(TOKENIZER, Prompt("{} is", ("good", "not good at all")), 20, None)
    told = made.choices()
    assert told["choices"].shape == (2, 5)
    assert told["choice_segments"].tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    words = TOKENIZER("not good at all", add_special_tokens=False)["input_ids"]
    assert told["choices"][1].tolist() == [*words, made.tokens.eos]
    assert told["decoder_inputs"][1].tolist() == [made.tokens.pad, *words]


def test_long_texts_are_cut_at_a_word_and_batches_at_their_longest_text() -> None:
    made = reader(length=10)
    text = made.words(" ".join("abcdefghijk"), made.room)
    assert len(text.words) == made.room == 7
    assert made.shown(text)[1].all()
    data = DomainPrompts(DrawnReviews(20, 5), TOKENIZER, val_size=2, batch_size=4)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    cut = data.on_before_batch_transfer(dict(batch), 0)
    longest = int(batch["input_segments"].sum(dim=1).max())
    assert cut["inputs"].shape == cut["input_segments"].shape == (4, longest)
    assert torch.equal(cut["inputs"], batch["inputs"][:, :longest])
    assert torch.equal(cut["choices"], batch["choices"])


def test_drawn_reviews_praise_in_words_of_their_own_and_tell_what_comes_after_in_shared_ones() -> None:
    domains = DrawnReviews(400, 100, shared=0.5, seed=2)
    source, target, test = domains.source(), domains.target(), domains.target_test()
    assert source == DrawnReviews(400, 100, shared=0.5, seed=2).source()
    assert isinstance(target, UnlabelledTexts)
    assert not set(target.texts) & set(test.texts) or len(set(test.texts)) > 90
    kitchen = {word for words in WORDS["kitchen"] for word in words}
    books = {word for words in WORDS["books"] for word in words}
    assert not kitchen & books
    assert not any(kitchen & set(text.split()) for text in source.texts)
    assert all(set(WORDS["kitchen"][label]) & set(text.split()) for text, label in zip(*test, strict=True))
    shared = [bool(set(AFTERWARDS[label]) & set(text.split())) for text, label in zip(*source, strict=True)]
    assert np.mean(shared) == pytest.approx(0.5, abs=0.08)
    assert not any(set(AFTERWARDS[1 - label]) & set(text.split()) for text, label in zip(*source, strict=True))


def test_mixed_reviews_praise_and_blame_against_their_label_as_often_as_asked() -> None:
    def contrary(mixed: float) -> float:
        source = DrawnReviews(1000, 5, mixed=mixed).source()
        count = sum(
            len(set(WORDS["books"][1 - label]) & set(text.split())) for text, label in zip(*source, strict=True)
        )
        return count / 2000

    assert [contrary(0.0), contrary(1.0)] == [0, 1]
    assert contrary(0.2) == pytest.approx(0.2, abs=0.04)
    source = DrawnReviews(200, 5, shared=1.0, mixed=1.0).source()
    assert all(set(AFTERWARDS[label]) & set(text.split()) for text, label in zip(*source, strict=True))


BAD: list[tuple[dict[str, list[Any]], str]] = [
    ({"source": ["{"]}, "source.jsonl, line 1 is not JSON"),
    ({"source": [{"text": " ", "label": 0}]}, "line 1 has no text, or an empty one"),
    ({"source": [{"text": "a"}]}, "line 1 has no label that is a whole number"),
    ({"source": [{"text": "a", "label": -1}]}, "has no label that is a whole number"),
    ({"source": [{"text": "a", "label": 2}] * 5}, "labels up to 2, and the prompt words for 2"),
    ({"source": [{"text": "!!!", "label": 0}] * 5}, "leaves nothing of the text '!!!'"),
    ({"target": []}, "target.jsonl has no text"),
    ({"source": [{"text": "a", "label": 0}] * 2}, "ask for more than the 2 texts"),
]


@pytest.mark.parametrize(("rows", "said"), BAD)
def test_lines_that_cannot_be_learned_from_are_refused(rows: dict[str, list[Any]], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        DomainPrompts(files(tmp_path, **rows), TOKENIZER, val_size=2).setup()


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Prompt("no place"), "needs one"),
    (lambda: Prompt(labels=("one",)), "at least two, all different"),
    (lambda: Prompt(labels=("one", "one")), "at least two, all different"),
    (lambda: PromptReader(TOKENIZER, Prompt(labels=("good!", "good")), 20, None).choices(), "apart"),
    (lambda: reader(length=4), "length=4 leaves no room"),
    (lambda: PromptReader(TOKENIZER, Prompt(), 20, appended(100, 9)), "are among the 4,096 that texts have"),
    (lambda: DomainPrompts(DrawnReviews(), TOKENIZER, val_size=0), "val_size=0"),
    (lambda: RandomWords(1.0), "RandomWords rate=1.0"),
    (lambda: InformativeWords().places(["a"], np.random.default_rng(0)), "got no labelled texts"),
    (lambda: DrawnReviews(shared=2), "shared=2"),
    (lambda: DrawnReviews(mixed=-0.1), "mixed=-0.1"),
    (lambda: DrawnReviews(source="cars"), "source='cars'"),
    (lambda: DomainFiles("/nowhere/a", "b").source(), "cannot be read"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED)
def test_settings_that_cannot_work_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()
