"""CropMAE: its loss by hand, which view a guess depends on and how."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import Plain
from lightspan.methods.masked.cropmae import CropMAE
from lightspan.nn.decoders.cross_decoder import CrossDecoder, CrossFirst
from lightspan.nn.masking.mask_samplers import RandomMasks, seen_and_hidden


def method(optimizer: Any = torch.optim.SGD, dropout: float = 0.0, **settings: Any) -> CropMAE:
    torch.manual_seed(0)
    backbone = vit(16, 2, 2, img_size=12, patch_size=3, in_chans=1)
    block = partial(CrossFirst, heads=2, mlp_width=16, dropout=dropout)
    decoder = CrossDecoder(16, 9, width=8, depth=2, block=block, place_other=False)
    return CropMAE(backbone, decoder, **{"optimizer": partial(optimizer, lr=0.1)} | settings)


def batch(rows: int = 6, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(rows, 1, 12, 12, generator=generator) for _ in range(2)]
    return {"views": views, "label": torch.zeros(rows, dtype=torch.int64), "index": torch.arange(rows) + 10 * seed}


def places(model: CropMAE, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return seen_and_hidden(model.masks.draw((4, 4), 0, given["index"].tolist()))


@pytest.mark.parametrize("hidden_view", [0, 1])
def test_the_loss_is_that_of_the_hidden_patches_in_plain_numpy(hidden_view: int) -> None:
    model, given = method(hidden_view=hidden_view), batch()
    seen, hidden = places(model, given)
    assert (seen.shape, hidden.shape) == ((6, 1), (6, 15))  # one patch at least
    image, whole = given["views"][hidden_view], given["views"][1 - hidden_view]
    guess, errors = model.guess(image, whole, seen, hidden).detach().numpy(), []
    for row in range(6):
        for number, place in enumerate(hidden[row].tolist()):
            y, x = 3 * (place // 4), 3 * (place % 4)
            patch = image[row, :, y : y + 3, x : x + 3].numpy().transpose(1, 2, 0).ravel()
            target = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            errors.append(((guess[row, number] - target) ** 2).mean())
    assert float(model.training_step(given, 0)) == pytest.approx(np.mean(errors), rel=1e-5)


def test_two_of_196_patches_stay_visible() -> None:
    assert (~method().masks.draw((14, 14), 0, range(9))).sum(axis=(1, 2)).tolist() == [2] * 9


def test_guesses_depend_on_the_other_view_and_not_on_hidden_pixels() -> None:
    model, given = method(), batch()
    (whole, image), (seen, hidden) = given["views"], places(model, given)
    guess = model.guess(image, whole, seen, hidden)
    is_hidden = torch.zeros(6, 16, dtype=torch.bool).scatter(1, hidden, True).view(6, 1, 4, 1, 4, 1)
    blind = torch.where(is_hidden, 7.0, image.view(6, 1, 4, 3, 4, 3)).view_as(image)
    torch.testing.assert_close(model.guess(blind, whole, seen, hidden), guess, rtol=0, atol=1e-6)
    assert not torch.allclose(model.guess(image, whole.flip(0), seen, hidden), guess, atol=1e-3)
    for block in model.decoder.blocks:
        nn.init.zeros_(block.cross.out.weight)  # type: ignore[union-attr,arg-type]
    alone = model.guess(image, whole, seen, hidden)
    torch.testing.assert_close(model.guess(image, whole.flip(0), seen, hidden), alone, rtol=0, atol=0)


def test_a_block_is_the_authors_in_plain_steps() -> None:
    block, x, other = CrossFirst(8, heads=2, mlp_width=12).eval(), torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    by_hand = block.norm_cross(x + block.cross(x, other, other))
    by_hand = block.norm_mlp(by_hand + block.mlp.fc2(block.mlp.fc1(by_hand).relu()))
    by_hand = block.norm_own(by_hand + block.own(by_hand, by_hand, by_hand))
    torch.testing.assert_close(block(x, other), by_hand)
    assert block.mlp.fc1.out_features == 12
    block.train()
    assert not torch.equal(block(x, other), block(x, other))  # dropout is on, as in the authors' pre-training


def test_the_same_view_twice_is_twice_the_same() -> None:
    first, second = Plain(2)(torch.rand(1, 12, 12))
    assert torch.equal(first, second)


def test_every_weight_is_trained_and_positions_are_not() -> None:
    model = method(masks=RandomMasks(0.8))
    model.training_step(batch(), 0).backward()
    still = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert still == {"backbone.network.pos_embed"}
    (image, _) = batch()["views"]
    assert torch.equal(model.features({"image": image}), model.backbone(image))
    assert torch.equal(model.features(batch()), model.backbone(image))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="hidden_view=2 must be 0 or 1"):
        method(hidden_view=2)
    with pytest.raises(UserError, match=r"decoder\.out_features=7, and a patch of 3 x 3"):
        CropMAE(method().backbone, CrossDecoder(16, 7, 8, 1, partial(CrossFirst, heads=2)), optimizer=torch.optim.SGD)
    sizes = batch() | {"views": [torch.zeros(6, 1, 12, 12), torch.zeros(6, 1, 6, 6)]}
    with pytest.raises(UserError, match="both views of one size"):
        method().training_step(sizes, 0)
    with pytest.raises(UserError, match="CropMAE needs 2 views"):
        method().training_step(batch() | {"views": batch()["views"][:1]}, 0)
