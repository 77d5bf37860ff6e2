"""Labelled texts of one's own: classes by number and by name, pairs, what is held out, and which lines are refused."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lightspan.backbones.tokenizers import HashedWords
from lightspan.core.errors import UserError
from lightspan.datamodules.text import tokenized as tokenized_module
from lightspan.datamodules.text.labelled import LabelledTextFiles
from lightspan.datamodules.text.tokenized import tokenized, tokenized_pairs
from lightspan.methods.language.text_classifier import TextClassifier

WORDS = HashedWords()


def write(folder: Path, rows: list[Any], name: str = "texts.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def opened(path: str, **settings: Any) -> LabelledTextFiles:
    data = LabelledTextFiles(path, **({"tokenizer": WORDS, "length": 8, "batch_size": 2} | settings))
    data.setup()
    return data


def labels(samples: Any) -> list[int]:
    return samples.data.labels.tolist()


def test_numbers_are_classes_and_names_have_those_of_the_training_file_in_order(tmp_path: Path) -> None:
    numbers = write(tmp_path, [{"text": f"t {n}", "label": n % 2 * 3} for n in range(6)], "n.jsonl")
    data = opened(numbers, val_size=2)
    assert data.num_classes == 4
    assert (labels(data.train), labels(data.val)) == ([3, 0, 0, 3], [0, 3])
    names = write(tmp_path, [{"s": f"t {n}", "kind": "cat" if n % 2 else "ant"} for n in range(4)], "a.jsonl")
    few = write(tmp_path, [{"s": "x", "kind": "cat"}], "v.jsonl")
    data = opened(names, val_path=few, test_path=few, fields=["s"], label="kind")
    assert data.num_classes == 2
    assert (labels(data.train), labels(data.val), labels(data.test)) == ([0, 1, 0, 1], [1], [1])
    assert [batch["label"].tolist() for batch in data.test_dataloader()] == [[1]]
    one = opened(write(tmp_path, [{"text": "x", "label": 0}] * 4, "one.jsonl"))
    assert one.num_classes == 1


def test_what_is_read_of_a_text_is_what_its_tokenizer_gives(tmp_path: Path) -> None:
    data = opened(
        write(tmp_path, [{"text": "one <pad> two", "label": 1}, {"text": "a " * 99, "label": 0}] * 2), val_size=1
    )
    sample = data.train.sample(1, 0)  # type: ignore[union-attr]
    assert sample["tokens"][sample["mask"] == 1].tolist() == WORDS("one pad two")["input_ids"]
    assert data.train.sample(0, 0)["mask"].all()  # type: ignore[union-attr]
    assert "token_types" not in sample


@functools.cache
def pieces() -> PreTrainedTokenizerFast:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return made


def test_of_two_texts_the_tokenizer_tells_which_is_the_second_and_the_network_is_told(tmp_path: Path) -> None:
    rows = [{"s1": "a a", "s2": "b", "label": n % 2} for n in range(4)]
    data = opened(write(tmp_path, rows), tokenizer=pieces(), fields=["s1", "s2"], batch_size=3, val_size=1)
    (batch,) = data.train_dataloader()
    assert batch["tokens"][0].tolist() == [2, 4, 4, 3, 5, 3, 0, 0]
    assert batch["token_types"][0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    network = BertModel(BertConfig(vocab_size=6, **small), add_pooling_layer=False)
    model = TextClassifier(network, 2, optimizer=functools.partial(torch.optim.SGD, lr=0.1)).eval()
    told, alone = model.features(batch), model.features({k: v for k, v in batch.items() if k != "token_types"})
    assert not torch.allclose(told, alone)
    plain = opened(write(tmp_path, rows), fields=["s1", "s2"])
    expected = WORDS("a a", "b")["input_ids"]
    assert plain.val.sample(0, 0)["tokens"][: len(expected)].tolist() == expected


def test_texts_are_the_same_tokens_in_however_many_pieces_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    firsts, seconds = ["a b", "a" * 40, "", "b"], ["b", "a", "b b b", ""]
    whole = tokenized(pieces(), firsts, 8), tokenized_pairs(pieces(), firsts, seconds, 8)
    monkeypatch.setattr(tokenized_module, "AT_ONCE", 4)
    apart = tokenized(pieces(), firsts, 8), tokenized_pairs(pieces(), firsts, seconds, 8)
    for before, after in zip(whole, apart, strict=True):
        assert all(map(np.array_equal, before, after))


def test_a_tokenizer_with_more_special_tokens_than_the_rows_are_long_is_refused() -> None:
    for length in (3, 4):
        if length == 4:
            assert tokenized_pairs(pieces(), ["a"], ["b"], length)[0].shape == (1, 4)
        else:
            with pytest.raises(UserError, match="length=3 leaves no room beside the 3 special tokens"):
                tokenized_pairs(pieces(), ["a"], ["b"], length)


BAD = [
    ("{", {}, "line 2 is not JSON"),
    ([], {}, "line 2 has no text"),
    ({"text": " ", "label": 1}, {}, "line 2 has no text"),
    ({"text": 5, "label": 1}, {}, "line 2 has no text"),
    ({"text": "a"}, {}, "line 2 has no label"),
    ({"text": "a", "label": -1}, {}, "line 2 has no label"),
    ({"text": "a", "label": True}, {}, "line 2 has no label"),
    ({"text": "a", "label": ""}, {}, "line 2 has no label"),
    ({"text": "a", "label": 1.0}, {}, "line 2 has no label"),
    ({"text": "a", "label": "one"}, {}, "labels that are names, such as 'one', and others that are numbers"),
    ({"text": "a", "label": 1}, {"fields": ["text", "other"]}, "line 1 has no other"),
    ({"text": "a", "label": 1}, {"val_size": 5}, "ask for more than the 2 lines"),
]


def test_lines_that_are_no_labelled_texts_are_refused_by_number(tmp_path: Path) -> None:
    first = {"text": "a", "label": 0}
    for line, settings, message in BAD:
        with pytest.raises(UserError, match=message):
            opened(write(tmp_path, [first, line]), **settings)
    for label in (2**20, 10**12, 2**70):  # for whose classes alone there is no memory
        with pytest.raises(UserError, match=r"has no label that is a whole number in \[0, 1,048,576\)"):
            opened(write(tmp_path, [first, {"text": "a", "label": label}]))
    with pytest.raises(UserError, match="has no text"):
        opened(write(tmp_path, []))
    with pytest.raises(UserError, match=r"v\.jsonl, line 1 is of the class 3"):
        opened(write(tmp_path, [first] * 2), val_path=write(tmp_path, [{"text": "a", "label": 3}], "v.jsonl"))
    with pytest.raises(UserError, match="test_path"):
        opened(write(tmp_path, [first] * 2)).test_dataloader()
    for settings, message in (
        ({"fields": []}, "fields="),
        ({"fields": ["a", "b", "c"]}, "fields="),
        ({"fields": ["a", "a"]}, "fields="),
        ({"fields": ["label"]}, "fields="),
        ({"val_size": 0}, "val_size=0"),
        ({"length": 2}, "length=2"),
    ):
        with pytest.raises(UserError, match=message):
            LabelledTextFiles("x", WORDS, **settings)  # type: ignore[arg-type]


def test_a_run_goes_on_with_the_texts_and_labels_that_it_had(tmp_path: Path) -> None:
    rows = [{"text": f"t {n}", "label": n % 2} for n in range(9)]
    first = opened(write(tmp_path, rows))
    state = first.train_dataloader().state_dict()
    opened(write(tmp_path, rows)).train_dataloader().load_state_dict(state)
    changed = opened(write(tmp_path, [row | {"label": n % 3} for n, row in enumerate(rows)])).train_dataloader()
    with pytest.raises(UserError, match="content"):
        changed.load_state_dict(state)


def test_where_the_file_is_not_here_a_plan_has_full_rows(tmp_path: Path) -> None:
    for fields in (["text"], ["text", "other"]):
        batch = LabelledTextFiles(str(tmp_path / "none"), pieces(), fields=tuple(fields), length=8).stand_in()
        assert batch is not None
        assert batch["mask"].tolist() == [[1] * 8] * 2
        assert ("token_types" in batch) == (len(fields) == 2)
    assert opened(write(tmp_path, [{"text": "a", "label": 0}] * 3)).stand_in() is None
