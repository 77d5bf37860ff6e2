"""NeRF-MAE: what each loss and each guess may depend on, masks, padding, and a loss that falls."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_runs import fit
from torch import Tensor
from torch.nn import functional as F

from lightspan.backbones.dense import DecodedMaps
from lightspan.backbones.grid_swin import GridSwin
from lightspan.core.errors import UserError
from lightspan.methods.masked.nerf_mae import FILLED, NeRFMAE, radiance_losses
from lightspan.nn.decoders.unetr_decoder import UNETRDecoder
from lightspan.nn.masking.mask_samplers import CoarseMasks, RandomMasks
from lightspan.nn.sequences.patches import patchify

PATCH = (2, 2, 2)


def method(**settings: Any) -> NeRFMAE:
    torch.manual_seed(0)
    backbone = GridSwin(PATCH, (2, 2, 2), 4, 12, (2, 1), (2, 2), positions=True)
    masks = CoarseMasks((1, 2, 2), RandomMasks(0.5))
    defaults: dict[str, Any] = {"masks": masks, "optimizer": partial(torch.optim.SGD, lr=0.1)}
    return NeRFMAE(backbone, UNETRDecoder([12, 24], 4, PATCH), **(defaults | settings))


def batch(rows: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    volume = torch.rand(rows, 4, 4, 8, 8, generator=generator)
    inside = torch.ones(rows, 4, 8, 8, dtype=torch.bool)
    inside[:, :, :, 7] = False
    volume[:, 3].masked_fill_(torch.rand(rows, 4, 8, 8, generator=generator) < 0.5, 0.0)
    return {"volume": volume * inside[:, None], "inside": inside, "index": torch.arange(rows) + 7}


def parts(rows: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = batch(rows)
    generator = torch.Generator().manual_seed(2)
    guess, hidden = torch.randn(rows, 4, 4, 8, 8, generator=generator), torch.rand(rows, 4, 8, 8, generator=generator)
    return guess, given["volume"], hidden < 0.6, given["inside"]


def test_losses_are_those_of_plain_loops() -> None:
    guess, grid, hidden, inside = parts(1)
    colour, alpha = [], []
    for d, h, w in np.ndindex(4, 8, 8):
        if inside[0, d, h, w] and grid[0, 3, d, h, w] > FILLED:
            colour.append(sum(float(guess[0, c, d, h, w] - grid[0, c, d, h, w]) ** 2 for c in range(3)))
        if inside[0, d, h, w] and hidden[0, d, h, w]:
            alpha.append(float(grid[0, 3, d, h, w] - 1 / (1 + torch.exp(-guess[0, 3, d, h, w]))) ** 2)
    found = radiance_losses(guess, grid, hidden, inside)
    assert float(found[0]) == pytest.approx(np.mean(colour), rel=1e-5)
    assert float(found[1]) == pytest.approx(np.mean(alpha), rel=1e-5)


def test_visible_alpha_colours_of_empty_voxels_and_padding_are_no_part_of_the_losses() -> None:
    guess, grid, hidden, inside = parts()
    colour, alpha = radiance_losses(guess, grid, hidden, inside)
    seen, padding = grid.clone(), grid.clone()
    filled = grid[:, 3] > FILLED
    seen[:, 3] = torch.where(~hidden & filled, 0.5 + grid[:, 3] / 2, grid[:, 3])  # other, and as filled as before
    assert torch.equal(radiance_losses(guess, seen, hidden, inside)[1], alpha)
    empty = grid.clone()
    empty[:, :3] = torch.where(~filled[:, None], 7.0, grid[:, :3])
    assert torch.equal(radiance_losses(guess, empty, hidden, inside)[0], colour)
    padding[~inside[:, None].expand_as(padding)] = 9.0
    wild = guess.masked_fill(~inside[:, None], torch.inf)
    for found, wanted in zip(radiance_losses(wild, padding, hidden, inside), (colour, alpha), strict=True):
        assert torch.equal(found, wanted)
    # And what the losses are of does count.
    other = torch.where(hidden[:, None], 1 - grid, grid)
    assert not torch.equal(radiance_losses(guess, other, hidden, inside)[1], alpha)


def test_losses_have_the_gradients_that_differences_say_and_are_0_of_nothing() -> None:
    guess, grid, hidden, inside = (part[:1, ..., :2, 5:] for part in parts(1))
    guess = guess.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: radiance_losses(x, grid.double(), hidden, inside), (guess,))
    nothing = torch.zeros_like(hidden)
    found = radiance_losses(guess, grid, nothing, nothing)
    assert [float(each) for each in found] == [0.0, 0.0]
    sum(found).backward()
    assert float(guess.grad.abs().sum()) == 0
    half = radiance_losses(guess.detach().bfloat16(), grid.bfloat16(), hidden, inside)
    assert all(each.dtype == torch.float32 and each.isfinite() for each in half)


@torch.no_grad()
def test_guesses_see_nothing_of_hidden_patches_and_their_token_has_no_position() -> None:
    model, given = method(), batch()
    volume = given["volume"]
    hidden = model.hidden(volume, given["index"], 3)
    voxels = model.voxels(hidden, volume)
    guess = model.guess(volume, hidden)
    assert guess.shape == volume.shape
    assert torch.equal(model.guess(volume.masked_fill(voxels[:, None], 5.0), hidden), guess)
    assert not torch.equal(model.guess(volume.masked_fill(~voxels[:, None], 0.5), hidden), guess)
    everything = torch.ones_like(hidden)
    maps = model.backbone.stage_maps(model.mask_token.expand(4, *hidden.shape[1:], -1))
    assert torch.equal(model.guess(volume, everything), model.decoder(maps, volume.shape[2:]))


def test_each_sample_has_its_own_mask_of_whole_blocks_with_the_exact_share() -> None:
    model, given = method(masks=CoarseMasks((2, 2, 2), RandomMasks(0.75))), batch(6)
    volume = torch.zeros(6, 4, 16, 16, 16)
    hidden = model.hidden(volume, given["index"], 0)
    assert hidden.shape == (6, 8, 8, 8)
    assert (hidden.float().mean(dim=(1, 2, 3)) == 0.75).all()
    blocks = patchify(hidden[:, None].float(), (2, 2, 2))
    assert torch.equal(blocks.amin(dim=2), blocks.amax(dim=2))
    assert len({row.numpy().tobytes() for row in hidden}) == 6
    assert torch.equal(model.hidden(volume[:2], given["index"][:2], 0), hidden[:2])
    assert not torch.equal(model.hidden(volume, given["index"], 1), hidden)
    assert method(masks=None).masks == CoarseMasks((4, 4, 4), RandomMasks(0.75))
    # A voxel is hidden with the patch that it is cut into.
    marked = torch.arange(512.0).view(1, 1, 8, 8, 8)
    voxels = model.voxels(marked[:, 0], volume[:1])
    assert torch.equal(patchify(voxels[:, None], PATCH)[0, :, 0], marked.ravel())


def test_patches_are_those_of_the_convolution_with_positions() -> None:
    backbone, volume = method().backbone, batch()["volume"]
    weight = backbone.patch_embed.proj.weight
    rows = patchify(volume, PATCH) @ weight.movedim(1, -1).flatten(1).T + backbone.patch_embed.proj.bias
    plain = backbone.patches(volume).flatten(1, 3) - backbone.embed_norm(rows)
    torch.testing.assert_close(plain, plain[:1].expand_as(plain), atol=1e-5, rtol=1e-5)
    assert len({tuple(row) for row in plain[0].round(decimals=3).tolist()}) == plain.shape[1]


def test_training_lowers_the_loss_and_every_weight_is_trained(tmp_path: Path) -> None:
    w = torch.arange(8).float() / 7
    level = torch.rand(8, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    alpha = ((w > level) * torch.ones(8, 4, 8, 8)).clamp(0.0, 1.0)
    volume = torch.stack([0.8 * alpha, 0.2 * alpha, w * alpha, alpha], dim=1)
    given = {"volume": volume, "index": torch.arange(8)}
    model = method(optimizer=partial(torch.optim.AdamW, lr=3e-3))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    losses = fit(model, [given] * 40, tmp_path)
    assert losses[-1] < 0.5 * losses[0]
    same = [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    assert same == []


def test_degenerate_grids_train(tmp_path: Path) -> None:
    for given in (
        batch(1), {**batch(2), "volume": torch.zeros(2, 4, 4, 8, 8)}, {**batch(2), "volume": torch.ones(2, 4, 4, 8, 8)},
        {**batch(2), "inside": torch.zeros(2, 4, 8, 8, dtype=torch.bool)},
        {"volume": torch.rand(2, 4, 3, 5, 7), "index": torch.arange(2)},  # sides that patches and stages do not fill
    ):  # fmt: skip
        model = method()
        assert np.isfinite(fit(model, [given] * 2, tmp_path)).all()
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert model.features(given).isfinite().all()
    half, given = method().bfloat16(), batch()
    low = {**given, "volume": given["volume"].bfloat16()}
    assert half.features(low).isfinite().all()
    assert half.losses(low, 0)[0].isfinite()


def test_validation_and_pictures_show_what_is_guessed() -> None:
    model, given, logged = method(), batch(), dict[str, Any]()
    model.log_dict = lambda figures, **rest: logged.update(figures)  # type: ignore[method-assign]
    model.validation_step(given, 0)
    first = dict(logged)
    model.validation_step(given, 1)
    assert first == logged
    assert {*logged} == {"val/colour_error", "val/alpha_mse"}
    found = model.reconstruct(given)
    assert found.image_BChw.shape == (4, 3, 4, 8, 8)
    seen = ~found.hidden_B1hw.expand_as(found.image_BChw)
    assert torch.equal(found.guess_BChw[seen], found.image_BChw[seen])
    assert not torch.equal(found.guess_BChw, found.image_BChw)


def test_parts_and_batches_that_do_not_fit_are_refused() -> None:
    sgd: Any = {"optimizer": torch.optim.SGD}
    backbone = GridSwin(PATCH, (2, 2, 2), 4, 12, (1, 1), (2, 2))
    with pytest.raises(UserError, match=r"decoder\.widths=\[12, 25\]"):
        NeRFMAE(backbone, UNETRDecoder([12, 25], 4, PATCH), **sgd)
    with pytest.raises(UserError, match=r"decoder\.patch=\[4, 4, 4\]"):
        NeRFMAE(backbone, UNETRDecoder([12, 24], 4), **sgd)
    with pytest.raises(UserError, match=r"decoder\.out_chans=3"):
        NeRFMAE(backbone, UNETRDecoder([12, 24], 3, PATCH), **sgd)
    with pytest.raises(UserError, match=r"backbone\.in_chans=1"):
        NeRFMAE(GridSwin(PATCH, (2, 2, 2), 1, 12, (1, 1), (2, 2)), UNETRDecoder([12, 24], 4, PATCH), **sgd)
    model, given = method(), batch()
    for inside in (torch.ones(4, 1, 4, 8, 8, dtype=torch.bool), torch.ones(4, 4, 8, 8), [True] * 4):
        with pytest.raises(UserError, match=r"NeRFMAE needs to know of each voxel .* bool \[4, 4, 8, 8\]"):
            model.training_step({**given, "inside": inside}, 0)
    with pytest.raises(UserError, match=r"NeRFMAE needs grids of red, green, blue and alpha"):
        model.training_step({**given, "volume": given["volume"][:, :3]}, 0)


def test_an_encoder_with_a_decoder_gives_maps_of_the_sample_s_size() -> None:
    network = DecodedMaps(method().backbone, UNETRDecoder([12, 24], 6, PATCH))
    volume = batch()["volume"]
    assert network(volume).shape == (4, network.num_features, 4, 8, 8)
    assert network(volume[:, :, :3, :5]).shape == (4, 6, 3, 5, 8)
    with pytest.raises(UserError, match="maps"):
        DecodedMaps(torch.nn.Identity(), UNETRDecoder([12], 6, PATCH))
    features = method().features(batch())
    torch.testing.assert_close(features, method().backbone.maps(volume)[-1].flatten(2).mean(dim=2))
    assert F.mse_loss(features[0], features[1]) > 0
