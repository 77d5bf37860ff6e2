"""Tags, captions and letters of a batch that are not one for each sample, or of another kind."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightspan.core.batches import samples_in
from lightspan.core.errors import UserError
from lightspan.nn.decoders.letter_decoder import LetterDecoder, letters_of
from lightspan.nn.sequences.texts import captions_of
from lightspan.nn.tags import tags_of

IMAGE, WORDS = torch.zeros(2, 1, 4, 4), torch.ones(2, 3, dtype=torch.int64)


def test_the_samples_of_a_batch_are_those_that_a_network_reads() -> None:
    assert [samples_in({"views": [IMAGE]}), samples_in({"tokens": WORDS[:1]}), samples_in({"x": IMAGE})] == [2, 1, 2]
    assert samples_in({"views": []}) is samples_in({"label": WORDS[:, 0]}) is None
    assert samples_in({"views": torch.stack([IMAGE] * 3)}) == 2  # views of one size may come as one tensor


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        (WORDS[:1], "tags of this batch has 1 rows, and the batch has 2 samples"),
        (WORDS[:, :2], r"a head of 3 tags, and tags of this batch are \[2, 2\]"),
        (WORDS[0], r"reads tags as whole numbers \[B, G\], and those of this batch are \[3\]"),
        ([[0, 1, 1]], "reads tags as whole .* those of this batch are a list"),
    ],
)
def test_tags_of_another_shape_are_refused(tags: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        tags_of({"image": IMAGE, "tags": tags}, "M", 3)
    known = said.replace("tags of this", "tags_known of this").replace("reads tags", "reads tags_known")
    with pytest.raises(UserError, match=known):
        tags_of({"image": IMAGE, "tags": WORDS, "tags_known": tags}, "M", 3)


@pytest.mark.parametrize(
    ("tokens", "mask"),
    [(WORDS, WORDS[:, :2]), (WORDS.float(), WORDS), (WORDS, WORDS.float()), (WORDS[:, :0],) * 2, (WORDS.tolist(),) * 2],
)
def test_captions_of_another_kind_are_refused(tokens: Any, mask: Any) -> None:
    with pytest.raises(UserError, match=r"M reads captions as tokens and mask, int64 \[B, T\] of at least one token"):
        captions_of({"image": IMAGE, "tokens": tokens, "mask": mask}, "M")


@pytest.mark.parametrize("field", ["tokens", "characters"])
def test_captions_and_words_of_another_number_of_samples_are_refused(field: str) -> None:
    batch: dict[str, Tensor] = {"image": IMAGE, "tokens": WORDS[:1], "mask": WORDS[:1], "characters": WORDS[:1]}
    with pytest.raises(UserError, match=f"M: {field} of this batch has 1 rows, and the batch has 2 samples"):
        captions_of(batch, "M") if field == "tokens" else letters_of(batch, LetterDecoder(3, 4, 8, 1, 2), "M")
