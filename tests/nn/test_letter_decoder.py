"""Orders of letters against their definition, and what a guess may depend on."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.decoders.letter_decoder import LetterDecoder, LetterOrders, letters_of, seen_in_order
from lightspan.nn.heads.attention_pool import FeatureMerge

WORDS = torch.tensor([[3, 1, 4, 2], [2, 5, 0, 0], [0, 0, 0, 0]])


def decoder(dropout: float = 0.0, **settings: int) -> LetterDecoder:
    torch.manual_seed(0)
    made = LetterDecoder(**{"letters": 5, "length": 4, "width": 8, "depth": 2, "heads": 2} | settings, dropout=dropout)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # apart from the small start, so that differences show
    return made.eval()


def memory(rows: int = 3) -> Tensor:
    return torch.randn(rows, 6, 8, generator=torch.Generator().manual_seed(1))


def reference(order: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """PARSeq's construction: a square of start, letters and end, in which each hides from itself what comes later."""
    whole = [0, *(place + 1 for place in order)]
    hidden = np.zeros((len(whole), len(whole)), dtype=bool)
    for rank, place in enumerate(whole):
        hidden[place, whole[rank + 1 :]] = True
    letters = ~hidden[:-1, :-1]
    np.fill_diagonal(hidden, True)
    return ~hidden[1:, :-1], letters


@pytest.mark.parametrize("letters", range(1, 6))
def test_what_is_seen_in_every_order_is_the_reference_construction(letters: int) -> None:
    for order in itertools.permutations(range(letters + 1)):
        guess, letter = seen_in_order(torch.tensor(order))
        expected_guess, expected_letter = reference([*order])
        assert np.array_equal(guess, expected_guess)
        assert np.array_equal(letter, expected_letter)


def test_from_left_to_right_the_masks_are_causal_and_each_guess_sees_its_predecessors_alone() -> None:
    guess, letter = seen_in_order(torch.arange(6))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(guess, causal)  # place i: the start and letters before it, which are columns 0 to i
    assert torch.equal(letter, causal)


@pytest.mark.parametrize("letters", range(2, 6))
def test_orders_come_in_pairs_none_twice_and_the_end_first_in_the_second(letters: int) -> None:
    seen = set()
    for step in range(60):
        orders = LetterOrders(6).draw(letters, step)
        assert orders.shape == (min(6, math.factorial(letters)), letters + 1)
        assert orders[0].tolist() == [*range(letters + 1)]
        assert orders[1].tolist() == [*range(letters, -1, -1)]
        assert len({tuple(order) for order in orders}) == len(orders)
        assert (orders[2:, -1] == letters).all()
        for order, mirror in zip(orders[2::2, :-1], orders[3::2, :-1], strict=True):
            assert order.tolist() == mirror[::-1].tolist()
        seen |= {tuple(order) for order in orders[2:, :-1]}
    if letters < 5:  # 60 steps suffice
        assert len(seen) == math.factorial(letters) - 2  # all but the first and its mirror
    assert np.array_equal(LetterOrders(6, seed=3).draw(letters, 7), LetterOrders(6, seed=3).draw(letters, 7))


def test_one_order_is_left_to_right_alone() -> None:
    assert LetterOrders(1).draw(4, 9).tolist() == [[0, 1, 2, 3, 4]]
    assert LetterOrders(6).draw(1, 9).tolist() == [[0, 1]]  # a letter has no other


def test_a_guess_depends_on_the_letters_before_it_in_the_order_and_on_no_other() -> None:
    model, order = decoder(depth=3), torch.tensor([2, 0, 3, 1, 4])
    word = WORDS[:1]
    logits = model(memory(1), word, order)
    for letter in range(4):
        changed = word.clone()
        changed[0, letter] = 5
        moved = (model(memory(1), changed, order) - logits).abs().amax(dim=2)[0] > 1e-5
        after = order.tolist()[order.tolist().index(letter) + 1 :]
        assert moved.nonzero()[:, 0].tolist() == sorted(after)


def test_what_stands_behind_the_end_is_no_letter_to_look_at() -> None:
    model, order = decoder(), torch.arange(5)
    logits = model(memory(), WORDS, order)
    torch.testing.assert_close(model(memory()[1:2], WORDS[1:2, :2], torch.arange(3)), logits[1:2, :3])
    assert logits.isfinite().all()  # of a word without letters too
    assert not torch.allclose(model(memory().flip(0), WORDS, order), logits, atol=1e-3)


def test_reading_takes_each_letter_from_those_read_before_and_stops_at_the_end() -> None:
    model, given = decoder(), memory(8)
    with torch.no_grad():
        model.head.bias[0] += 0.5  # ends come up
    read = model.read(given, refinements=0)
    logits = model(given, read, torch.arange(5)).argmax(dim=2)
    for word, likeliest in zip(read.tolist(), logits.tolist(), strict=True):
        length = word.index(0) if 0 in word else 4
        assert word[:length] == likeliest[:length]
        assert word[length:] == [0] * (4 - length)
        assert length == 4 or likeliest[length] == 0
    assert len({word.index(0) if 0 in word else 4 for word in read.tolist()}) > 1
    refined = model.read(given)
    assert refined.shape == read.shape
    assert ((refined > 0).int().diff(dim=1) <= 0).all()


def test_refinement_guesses_each_letter_anew_from_all_others() -> None:
    model, given = decoder(), 3 * memory(64)
    read, every = model.read(given, refinements=0), torch.ones(5, 5, dtype=torch.bool)
    others = every.clone()
    others[range(4), range(1, 5)] = False  # letter i is in column i + 1
    anew = model._guess(given, read, others, every)[:, :-1].argmax(dim=2)
    assert torch.equal(model.read(given), anew * (anew > 0).cumprod(dim=1))
    assert not torch.equal(model.read(given), read)


def test_letters_are_scaled_by_the_root_of_the_width_and_have_the_place_of_the_guess_that_they_answer() -> None:
    model, given, seen = decoder(), memory(), list[Tensor]()
    model.drop.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(given, WORDS, torch.arange(5))
    guesses, letters = seen
    scaled = 8**0.5 * model.embed(WORDS)
    torch.testing.assert_close(guesses, model.pos_embed.expand(3, 5, 8))
    torch.testing.assert_close(letters[:, 0], 8**0.5 * model.embed.weight[:1].expand(3, 8))
    torch.testing.assert_close(letters[:, 1:], scaled + model.pos_embed[:4])


def test_half_precision_reaches_every_weight() -> None:
    model = decoder().train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.in_orders(memory(), WORDS, LetterOrders(), 0)
    assert logits.shape == (6, 3, 5, 6)
    logits.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_merged_features_have_one_token_a_place_whatever_the_order_of_patches() -> None:
    torch.manual_seed(0)
    merge, patches = FeatureMerge(16, heads=4).eval(), torch.randn(2, 9, 16)
    merged = merge(patches)
    assert merged.shape == (2, 26, 16)
    torch.testing.assert_close(merge(patches[:, torch.randperm(9)]), merged, rtol=0, atol=1e-5)
    by_hand = merge.query_tokens + merge.attention(merge.query_tokens.expand(2, -1, -1), patches, patches)
    torch.testing.assert_close(merged, by_hand + merge.mlp(merge.norm(by_hand)))
    assert float(merge.query_tokens.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_the_merge_unit_drops_in_the_four_places_of_its_authors() -> None:
    """Attention weights, what the attention says, what the MLP's activation gives, and what the MLP says."""
    merge = FeatureMerge(16, heads=4)
    assert merge.attention.dropout == 0.1
    assert [each.p for each in merge.modules() if isinstance(each, nn.Dropout)] == [0.1] * 3
    half = FeatureMerge(16, heads=4, dropout=0.5)
    with torch.no_grad():
        merged = half(torch.randn(64, 9, 16))
        zero = (merged - half.query_tokens).abs() < 1e-12  # both branches dropped
    assert float(zero.float().mean()) == pytest.approx(0.25, abs=0.02)


def test_what_does_not_fit_is_refused() -> None:
    model = decoder()
    with pytest.raises(UserError, match=r"words of up to 7 letters are longer than the decoder's length=4; .*longest"):
        letters_of({"characters": torch.zeros(2, 7, dtype=torch.int64)}, model, "Some")
    with pytest.raises(UserError, match="characters from 0 to 6 are outside the decoder's alphabet of letters=5"):
        letters_of({"characters": torch.tensor([[6, 0]])}, model, "Some")
    with pytest.raises(UserError, match="Some reads the letters of words as characters"):
        letters_of({"image": torch.zeros(2)}, model, "Some")
    for settings, message in (({"count": 5}, "count=5 must be 1"), ({"seed": -1}, "seed=-1")):
        with pytest.raises(UserError, match=message):
            LetterOrders(**settings)
    with pytest.raises(UserError, match="length=0"):
        LetterDecoder(length=0)
    with pytest.raises(UserError, match="queries=0"):
        FeatureMerge(8, queries=0)
