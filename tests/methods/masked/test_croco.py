"""CroCo: its loss by hand, what a guess depends on, what is read of pairs and of single pictures."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.masked.croco import CroCo
from lightspan.nn.decoders.cross_decoder import CrossDecoder, SelfFirst
from lightspan.nn.masking.mask_samplers import MaskSampler, RandomMasks, seen_and_hidden


def method(optimizer: Any = torch.optim.SGD, class_token: bool = False, **settings: Any) -> CroCo:
    torch.manual_seed(0)
    backbone = vit(16, 2, 2, img_size=12, patch_size=3, in_chans=1, class_token=class_token)
    decoder = CrossDecoder(16, width=8, depth=2, block=partial(SelfFirst, heads=2))
    return CroCo(backbone, decoder, **{"optimizer": partial(optimizer, lr=0.1)} | settings)


def batch(rows: int = 6, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(rows, 1, 12, 12, generator=generator) for _ in range(2)]
    return {"views": views, "label": torch.zeros(rows, dtype=torch.int64), "index": torch.arange(rows) + 10 * seed}


def places(model: CroCo, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return seen_and_hidden(model.masks.draw((4, 4), 0, given["index"].tolist()))


@pytest.mark.parametrize("normalise", [True, False])
def test_the_loss_is_that_of_the_first_views_hidden_patches_in_plain_numpy(normalise: bool) -> None:
    model, given = method(normalise=normalise), batch()
    seen, hidden = places(model, given)
    assert (seen.shape, hidden.shape) == ((6, 2), (6, 14))
    first, second = given["views"]
    guess, errors = model.guess(first, second, seen, hidden).detach().numpy(), []
    for row in range(6):
        for number, place in enumerate(hidden[row].tolist()):
            y, x = 3 * (place // 4), 3 * (place % 4)
            target = first[row, :, y : y + 3, x : x + 3].numpy().transpose(1, 2, 0).ravel()
            if normalise:
                target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            errors.append(((guess[row, number] - target) ** 2).mean())
    assert float(model.training_step(given, 0)) == pytest.approx(np.mean(errors), rel=1e-5)


def test_176_of_196_patches_are_hidden_in_every_pair() -> None:
    hidden = method().masks.draw((14, 14), 0, range(9))
    assert hidden.sum(axis=(1, 2)).tolist() == [int(0.9 * 196)] * 9
    assert len({row.tobytes() for row in hidden}) == 9


def test_guesses_depend_on_the_second_view_and_not_on_hidden_pixels() -> None:
    model, given = method(masks=RandomMasks(0.75)), batch()
    (first, second), (seen, hidden) = given["views"], places(model, given)
    guess = model.guess(first, second, seen, hidden)
    is_hidden = torch.zeros(6, 16, dtype=torch.bool).scatter(1, hidden, True).view(6, 1, 4, 1, 4, 1)
    blind = torch.where(is_hidden, 7.0, first.view(6, 1, 4, 3, 4, 3)).view_as(first)
    torch.testing.assert_close(model.guess(blind, second, seen, hidden), guess, rtol=0, atol=1e-6)
    assert not torch.allclose(model.guess(first, second.flip(0), seen, hidden), guess, atol=1e-3)
    # Each patch of the second view counts, by its place: it is seen whole, and in its order.
    for y, x in ((0, 0), (9, 9)):
        changed = second.clone()
        changed[:, :, y : y + 3, x : x + 3] += 1
        assert not torch.allclose(model.guess(first, changed, seen, hidden), guess, atol=1e-4)


def test_without_cross_attention_it_is_an_mae() -> None:
    model, given = method(), batch()
    (first, second), (seen, hidden) = given["views"], places(model, given)
    for block in model.decoder.blocks:
        nn.init.zeros_(block.cross.out.weight)  # type: ignore[union-attr,arg-type]
    alone = model.guess(first, second, seen, hidden)
    torch.testing.assert_close(model.guess(first, second.flip(0), seen, hidden), alone, rtol=0, atol=0)
    assert not torch.allclose(model.guess(first.flip(0), second, seen, hidden), alone, atol=1e-3)
    said = model.pair_tokens(first, second)  # of the first view too: the second is only looked at
    torch.testing.assert_close(model.pair_tokens(first, second.flip(0)), said, rtol=0, atol=0)
    assert not torch.allclose(model.pair_tokens(first.flip(0), second), said, atol=1e-3)


def test_the_second_views_tokens_may_come_in_any_order_with_their_places() -> None:
    block, x, other = SelfFirst(8, heads=2), torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    torch.testing.assert_close(block(x, other[:, torch.randperm(7)]), block(x, other))


def test_a_block_is_the_papers_in_plain_steps() -> None:
    block, x, other = SelfFirst(8, heads=2), torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    memory = block.norm_other(other)
    by_hand = x + block.own(block.norm_own(x), block.norm_own(x), block.norm_own(x))
    by_hand = by_hand + block.cross(block.norm_cross(by_hand), memory, memory)
    by_hand = by_hand + block.mlp(block.norm_mlp(by_hand))
    torch.testing.assert_close(block(x, other), by_hand)


@pytest.mark.parametrize("class_token", [False, True])
def test_pairs_are_read_by_the_decoder_and_pictures_by_the_encoder(class_token: bool) -> None:
    model, given = method(class_token=class_token).eval(), batch()
    first, second = given["views"]
    tokens = model.pair_tokens(first, second)
    assert tokens.shape == (6, 16, 8)
    torch.testing.assert_close(model.features(given), tokens.mean(dim=1))
    assert not torch.allclose(model.features(given | {"views": [first, first]}), tokens.mean(dim=1), atol=1e-3)
    for single in ({"image": first}, {"views": [first]}):
        assert torch.equal(model.features(single), model.backbone(first))
    own, last = model.token_features(given, [0, -1])
    assert own.tokens_BTD.shape == last.tokens_BTD.shape == (6, 16 + class_token, 8)
    torch.testing.assert_close(model.decoder.norm(last.tokens_BTD)[:, int(class_token) :], tokens)
    (of_picture,) = model.token_features({"image": first})
    assert of_picture.tokens_BTD.shape == (6, 16, 16)


def test_every_weight_is_trained_and_positions_are_not() -> None:
    model = method(masks=RandomMasks(0.8))
    model.training_step(batch(), 0).backward()
    still = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert still == {"backbone.network.pos_embed"}


def test_pairs_of_one_colour_have_finite_gradients() -> None:
    model = method()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.training_step(batch() | {"views": [torch.ones(6, 1, 12, 12)] * 2}, 0)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


class Every(MaskSampler):
    """Hides every patch."""

    def draw(self, grid: tuple[int, ...], step: int, indices: Any, view: int = 0) -> np.ndarray:
        return np.ones((len(indices), *grid), dtype=bool)


def test_what_does_not_fit_is_refused() -> None:
    for masks, count in ((Every(), 16), (RandomMasks(0.0), 0)):
        with pytest.raises(UserError, match=f"masks hides {count} of 16; set model.init_args.masks"):
            method(masks=masks).training_step(batch(), 0)
    sizes = batch() | {"views": [torch.zeros(6, 1, 12, 12), torch.zeros(6, 1, 6, 6)]}
    for read in (method().features, partial(method().training_step, batch_idx=0)):
        with pytest.raises(UserError, match=r"CroCo needs views of one size, .* \[\[1, 12, 12\], \[1, 6, 6\]\]"):
            read(sizes)
    uneven = batch() | {"views": [torch.zeros(6, 1, 13, 13)] * 2}
    with pytest.raises(UserError, match="13 x 13 cannot be cut into patches of 3 x 3"):
        method().training_step(uneven, 0)
    with pytest.raises(UserError, match="CroCo needs 2 views"):
        method().training_step(batch() | {"views": batch()["views"][:1]}, 0)
    with pytest.raises(UserError, match=r"decoder\.out_features=7, and a patch of 3 x 3"):
        CroCo(method().backbone, CrossDecoder(16, 7, 8, 1, partial(SelfFirst, heads=2)), optimizer=torch.optim.SGD)
