"""Masks of whole words: one inside the other, within their shares, and what stands in place of hidden words."""

import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.nn.masking.word_masks import NestedWordMasks

# <start> six words of one to three tokens <end>, padding
WORDS = np.asarray([[-1, 0, 1, 1, 2, 2, 2, 3, 4, 4, 5, -1, -1, -1]] * 50)


def drawn(inner: float = 0.3, outer: float = 0.6, step: int = 0, seed: int = 0) -> np.ndarray:
    return NestedWordMasks(inner, outer, seed).draw(WORDS, step, range(50))


def test_the_inner_mask_lies_in_the_outer_one_and_both_keep_to_their_shares() -> None:
    inner, outer = drawn()
    assert not (inner & ~outer).any()
    assert inner.sum(axis=1).max() <= round(12 * 0.3)
    assert outer.sum(axis=1).max() == round(12 * 0.6)
    assert inner.sum(axis=1).min() >= 1
    assert (outer.sum(axis=1) == round(12 * 0.6)).mean() > 0.5  # what does not fit is passed over for what does
    assert not outer[:, WORDS[0] < 0].any()


def test_words_are_hidden_as_a_whole_and_all_of_them_are_in_time() -> None:
    for mask in drawn():
        for word in range(6):
            own = mask[:, WORDS[0] == word]
            assert (own.all(axis=1) == own.any(axis=1)).all()
            assert 0 < own.any(axis=1).mean() < 1


def test_draws_are_functions_of_seed_step_and_text() -> None:
    assert np.array_equal(drawn(), drawn())
    assert not np.array_equal(drawn(), drawn(step=1))
    assert not np.array_equal(drawn(), drawn(seed=1))
    alone = NestedWordMasks(0.3, 0.6).draw(WORDS[:1], 0, [7])
    assert np.array_equal(alone[:, 0], drawn()[:, 7])


def test_equal_shares_give_equal_masks_and_texts_without_words_none() -> None:
    inner, outer = drawn(0.4, 0.4)
    assert np.array_equal(inner, outer)
    assert not NestedWordMasks().draw(np.full((2, 3), -1), 0, [0, 1]).any()
    assert NestedWordMasks().draw(np.asarray([[-1, 0, -1]]), 0, [0])[:, 0, 1].all()  # one token at least


def test_eight_of_ten_masked_tokens_are_hidden_one_is_any_and_one_stays() -> None:
    tokens, mask = np.full((200, 50), 7), np.ones((200, 50), dtype=bool)
    mask[:, 25:] = False
    masks = NestedWordMasks()
    new = masks.hide(tokens, mask, 99, 1000, 0, range(200), 1)
    assert (new[:, 25:] == 7).all()
    assert (new[:, :25] == 99).mean() == pytest.approx(0.8, abs=0.02)
    assert (new[:, :25] == 7).mean() == pytest.approx(0.1, abs=0.015)
    assert np.array_equal(new, masks.hide(tokens, mask, 99, 1000, 0, range(200), 1))
    assert not np.array_equal(new, masks.hide(tokens, mask, 99, 1000, 0, range(200), 2))


@pytest.mark.parametrize(("inner", "outer", "seed"), [(0.5, 0.4, 0), (0.0, 0.4, 0), (0.2, 1.0, 0), (0.2, 0.4, -1)])
def test_shares_that_cannot_be_are_refused(inner: float, outer: float, seed: int) -> None:
    with pytest.raises(UserError, match=r"inner=.*and outer="):
        NestedWordMasks(inner, outer, seed)


def test_shares_are_rounded_and_only_what_the_smaller_mask_takes_uses_up_its_share() -> None:
    singles = np.array([[-1, 0, 1, 2, 3, 4, 5, -1]])  # 8 tokens: 1.6 and 3.6 of them
    one_long = np.array(
        [[-1, 0, 0, 0, 1, 2, -1]]
    )  # 7 tokens: 1 and 4; a word of three never fits into the smaller mask
    for step in range(12):
        assert NestedWordMasks(0.2, 0.45).draw(singles, step, [0]).sum(axis=2).tolist() == [[2], [4]]
        inner, outer = NestedWordMasks(0.2, 0.6).draw(one_long, step, [0])
        assert inner.sum() == 1
        assert outer.sum() == (4 if outer[0, 1] else 2)
