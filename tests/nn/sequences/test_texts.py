"""Batches of texts and sequences: what a method reads of one is checked, and numbers of any type are read alike."""

from typing import Any

import pytest
import torch
from method_cases import CASES
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.datamodules.text.json_lines import json_lines
from lightspan.nn.sequences.texts import require_known_tokens

READ = {
    "contrastive.starbucks": ("tokens", "mask", "document_tokens", "document_mask"),
    "contrastive.starbucks, scores": ("tokens", "mask", "document_tokens", "document_mask", "score"),
    "language.prompted_classifier": (
        *("inputs", "input_segments", "choices", "decoder_inputs", "choice_segments", "label"),
    ),
    "language.text_classifier": ("tokens", "mask", "label"),
    "masked.ul2": ("inputs", "input_segments", "targets", "decoder_inputs", "target_segments", "target_bytes"),
    "masked.smae": ("tokens", "mask", "word", "index"),
    "masked.spt": ("sequence", "index"),
    "masked.spt, symbols": ("tokens", "index"),
}
"""Fields that a method cannot do without."""
OF_TOKENS = {name: [field for field in fields if field in ("tokens", "inputs")] for name, fields in READ.items()}


def quiet(name: str) -> Any:
    model = CASES[name].make()
    model.log = model.log_dict = lambda *args, **options: None
    return model


def both_steps(model: Any, batch: dict[str, Any]) -> None:
    model.training_step(batch, 0)
    model.validation_step(batch, 0)


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in READ.items() for field in fields])
def test_a_field_that_is_missing_or_no_tensor_is_named(name: str, field: str) -> None:
    model, given = quiet(name), CASES[name].batch(4, 0)
    for wrong in ({}, {field: None}, {field: given[field].tolist()}, {field: given[field][:, None, None]}):
        rest = {other: value for other, value in given.items() if other != field}
        with pytest.raises(UserError, match=field):
            both_steps(model, rest | wrong)


@pytest.mark.parametrize("name", ["contrastive.starbucks", "language.text_classifier", "masked.smae"])
def test_features_read_tokens_with_their_mask(name: str) -> None:
    model, given = quiet(name), CASES[name].batch(4, 0)
    for field in ("tokens", "mask"):
        with pytest.raises(UserError, match=field):
            model.features({other: value for other, value in given.items() if other != field})
        with pytest.raises(UserError, match="reads tokens as int64 of 2 axes, with mask of the same shape"):
            model.features(given | {field: given[field][:, 1:]})


@pytest.mark.parametrize("name", [name for name in READ if "spt" not in name])
def test_whole_numbers_of_32_bits_are_read_like_those_of_64(name: str) -> None:
    model, given = quiet(name), CASES[name].batch(4, 0)
    narrow = {field: value if value.is_floating_point() else value.int() for field, value in given.items()}
    assert torch.equal(model.training_step(narrow, 0), model.training_step(given, 0))
    model.validation_step(narrow, 0)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16])
def test_labels_of_any_whole_type_are_read(kind: torch.dtype) -> None:
    model, given = quiet("language.prompted_classifier"), CASES["language.prompted_classifier"].batch(4, 0)
    small = given | {"label": given["label"].to(kind)}
    assert torch.equal(model.training_step(small, 0), model.training_step(given, 0))
    model.validation_step(small, 0)


@pytest.mark.parametrize("name", ["masked.spt", "supervised.sequence_classifier"])
def test_values_of_any_floating_type_are_read_in_that_of_the_weights(name: str) -> None:
    model, given = quiet(name), CASES[name].batch(4, 0)
    for kind in (torch.float64, torch.float16):
        rounded = given["sequence"].to(kind)
        found = model.training_step(given | {"sequence": rounded}, 0)
        assert torch.equal(found, model.training_step(given | {"sequence": rounded.float()}, 0))


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in OF_TOKENS.items() for field in fields])
def test_a_token_without_an_embedding_is_refused_before_its_batch_goes_to_the_device(name: str, field: str) -> None:
    model, given = quiet(name), CASES[name].batch(4, 0)
    assert model._on_before_batch_transfer(given) is given
    for wrong in (-1, model.num_tokens):
        scribbled = given[field].clone()
        scribbled[1, 2] = wrong
        with pytest.raises(UserError, match=rf"{field} of this batch are numbers from .* in \[0, {model.num_tokens}\)"):
            model._on_before_batch_transfer(given | {field: scribbled})
    last = torch.full_like(given[field], model.num_tokens - 1)
    model._on_before_batch_transfer(given | {field: last})


def test_what_is_no_field_of_tokens_is_not_looked_at() -> None:
    nothing: list[Any] = [
        [torch.tensor([9])],
        {"targets": torch.tensor([-100])},
        {"tokens": None},
        {"tokens": torch.zeros(0).long()},
    ]
    for batch in nothing:
        require_known_tokens(batch, 3, "Method")


def test_texts_without_a_token_of_their_own_are_ordinary() -> None:
    model, given = quiet("language.text_classifier"), CASES["language.text_classifier"].batch(4, 0)
    assert not model.features(given | {"mask": given["mask"] * 0}).any()


def test_any_number_but_0_is_a_token_of_the_text() -> None:
    model, given = quiet("masked.smae"), CASES["masked.smae"].batch(4, 0)
    large: dict[str, Tensor] = given | {"mask": given["mask"] * 7}
    for found, expected in zip(model.losses(large), model.losses(given), strict=True):
        assert found.isfinite().all()
        assert expected.isfinite().all()


def test_a_value_that_is_no_number_has_a_loss_that_is_none_and_one_beyond_all_levels_has_the_last() -> None:
    model, given = quiet("masked.spt, next value"), CASES["masked.spt, next value"].batch(4, 0)
    broken = given["sequence"].clone()
    broken[1, 3] = torch.nan
    assert model.training_step(given | {"sequence": broken}, 0).isnan()
    beyond = given["sequence"].clone()
    beyond[:, -1] = 5.0  # belongs to the last level, and a causal network does not read it before it is guessed
    at_the_end = given["sequence"].clone()
    at_the_end[:, -1] = 1.0
    found, expected = (model.training_step(given | {"sequence": x}, 0) for x in (beyond, at_the_end))
    assert torch.equal(found, expected)


def test_lines_may_begin_with_the_mark_of_windows(tmp_path: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "\xef\xbb\xbfb"}\r\n')
    assert [row["text"] for _, row in json_lines(str(file), "path", "text", "text")] == ["a", "\ufeffb"]
