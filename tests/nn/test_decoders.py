"""Decoders of hidden patches: what their guesses may depend on, and what they may not."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.decoders.cross_decoder import CrossDecoder, CrossFirst, SelfFirst
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.decoders.masked_sequence import MaskedSequence
from lightspan.nn.sequences.attention import MultiHeadAttention
from lightspan.nn.sequences.positions import sincos

GRID = (2, 3)
AT, ASK = torch.tensor([[4, 0], [1, 5]]), torch.tensor([[2, 5, 1], [0, 3, 2]])
BLOCKS: dict[str, Any] = {"croco": partial(SelfFirst, heads=2), "cropmae": partial(CrossFirst, heads=2, mlp_width=16)}


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn(2, count, 6, generator=torch.Generator().manual_seed(seed))


def mask_decoder() -> MaskDecoder:
    torch.manual_seed(0)
    return MaskDecoder(6, 5, width=8, depth=2, heads=2).eval()


def cross_decoder(kind: str, **settings: Any) -> CrossDecoder:
    torch.manual_seed(0)
    return CrossDecoder(6, 5, width=8, depth=2, block=BLOCKS[kind], **settings).eval()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_sequence_is_tokens_and_mask_tokens_each_with_its_place() -> None:
    sequence, table = MaskedSequence(6, 8), sincos(GRID, 8)
    x = sequence(tokens(3), AT, ASK, GRID)
    embedded = sequence.embed(tokens(3))
    for row in range(2):
        close(x[row, 0], embedded[row, 0])
        close(x[row, 1:3], embedded[row, 1:] + table[AT[row]])
        close(x[row, 3:], sequence.mask_token + table[ASK[row]])


def test_attention_is_torchs() -> None:
    ours, theirs = MultiHeadAttention(8, 2), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    close(ours(q, k, v), theirs(q, k, v, need_weights=False)[0])
    with torch.no_grad():
        ours.key.bias.add_(3.0)  # changes nothing, which is why others leave it out
    close(ours(q, k, v), theirs(q, k, v, need_weights=False)[0])
    assert ours(q, k[:, :0], v[:, :0]).allclose(ours.out.bias.expand(2, 3, 8))
    with pytest.raises(UserError, match="width=8 must be a multiple of heads=3"):
        MultiHeadAttention(8, 3)


@pytest.mark.parametrize("kind", ["self", *BLOCKS])
def test_guesses_follow_their_places_whatever_the_order_of_what_was_seen(kind: str) -> None:
    other = () if kind == "self" else (tokens(7, 1),)
    decoder = mask_decoder() if kind == "self" else cross_decoder(kind)
    guess = decoder(tokens(3), AT, ASK, *other, GRID)
    assert guess.shape == (2, 3, 5)
    order = [2, 0, 1]
    close(decoder(tokens(3), AT, ASK[:, order], *other, GRID), guess[:, order])
    close(decoder(tokens(3)[:, [0, 2, 1]], AT.flip(1), ASK, *other, GRID), guess)
    assert not torch.allclose(decoder(tokens(3), AT.flip(1), ASK, *other, GRID), guess, atol=1e-3)
    assert decoder(tokens(3), AT, ASK[:, :0], *other, GRID).shape == (2, 0, 5)
    # Prefix tokens take part.
    assert not torch.allclose(decoder(tokens(3)[:, 1:], AT, ASK, *other, GRID), guess, atol=1e-3)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_guess_depends_on_the_other_view_through_cross_attention_alone(kind: str) -> None:
    decoder = cross_decoder(kind)
    guess = decoder(tokens(3), AT, ASK, tokens(7, 1), GRID)
    assert not torch.allclose(decoder(tokens(3), AT, ASK, tokens(7, 2), GRID), guess, atol=1e-3)
    for block in decoder.blocks:
        nn.init.zeros_(block.cross.out.weight)  # type: ignore[union-attr,arg-type]
    close(decoder(tokens(3), AT, ASK, tokens(7, 1), GRID), decoder(tokens(3), AT, ASK, tokens(7, 2), GRID))


@pytest.mark.parametrize("place_other", [True, False])
def test_the_other_views_order_matters_where_the_decoder_gives_it_places(place_other: bool) -> None:
    decoder, other = cross_decoder("croco", place_other=place_other), tokens(7, 1)
    guess = decoder(tokens(3), AT, ASK, other, GRID)
    mixed = decoder(tokens(3), AT, ASK, torch.cat([other[:, :1], other[:, 1:].flip(1)], dim=1), GRID)
    assert torch.allclose(mixed, guess, atol=1e-5) != place_other


def test_a_decoder_for_pairs_of_views_gives_every_token_of_the_first() -> None:
    decoder, everything = cross_decoder("croco"), torch.arange(6).expand(2, -1)
    assert decoder.decode(tokens(6), everything, everything[:, :0], tokens(6, 1), GRID).shape == (2, 6, 8)


@pytest.mark.parametrize("kind", ["self", *BLOCKS])
def test_decoders_compute_in_half_precision_and_reach_all_weights(kind: str) -> None:
    other = () if kind == "self" else (tokens(7, 1),)
    decoder = (mask_decoder() if kind == "self" else cross_decoder(kind)).train()
    with torch.autocast("cpu", torch.bfloat16):
        guess = decoder(tokens(3), AT, ASK, *other, GRID)
    guess.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in decoder.parameters())


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="MaskDecoder: width=10 must be a multiple of heads=4"):
        MaskDecoder(6, 5, width=10, heads=4)
    with pytest.raises(UserError, match="depth=0"):
        CrossDecoder(6, 5, width=8, depth=0)
