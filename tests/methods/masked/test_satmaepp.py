"""SatMAE++: MAE as a special case, what each loss reads, the order of bands, and sizes."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_runs import fit
from torch import Tensor
from torch.nn import functional as F

from lightspan.backbones.placed_vit import GroupedViT
from lightspan.backbones.vit import vit
from lightspan.cli.config.resolve import resolve
from lightspan.core.errors import UserError
from lightspan.methods.masked.mae import MAE
from lightspan.methods.masked.satmaepp import SatMAEpp
from lightspan.nn.decoders.grouped_mask_decoder import GroupedMaskDecoder
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.decoders.upsampler import UpsamplerPyramid
from lightspan.nn.masking.mask_samplers import RandomMasks, TubeMasks
from lightspan.nn.sequences.positions import sincos, sincos_by_axis
from lightspan.nn.valid_pixels import area_reduced

GROUPS = ((0, 3), (1,), (4, 2))


def method(groups: Any = GROUPS, group_width: int = 4, steps: int = 2, **settings: Any) -> SatMAEpp:
    torch.manual_seed(0)
    bands = sum(map(len, groups))
    backbone = GroupedViT(groups, 16, 2, 2, patch_size=2, group_width=group_width)
    decoder = GroupedMaskDecoder(16, width=8, depth=1, heads=2, group_width=group_width)
    upsampler = settings.pop("upsampler", UpsamplerPyramid(bands, steps, 6) if steps else None)
    sgd = {"optimizer": partial(torch.optim.SGD, lr=0.1)}
    return SatMAEpp(backbone, decoder, upsampler, steps, **sgd | settings)


def batch(bands: int = 5, side: int = 32, rows: int = 4) -> dict[str, Any]:
    image = torch.randn(rows, bands, side, side, generator=torch.Generator().manual_seed(1))
    return {"image": image, "valid": torch.ones_like(image, dtype=torch.int64), "index": torch.arange(rows) + 7}


def figures(model: SatMAEpp, given: dict[str, Any]) -> dict[str, float]:
    logged: dict[str, float] = {}
    model.log_training = lambda of: logged.update({name: float(value) for name, value in of.items()})  # type: ignore[method-assign, assignment]
    model.training_step(given, 0)
    return logged


def test_one_group_at_one_scale_is_mae() -> None:
    ours = method([[0, 1, 2]], group_width=0, steps=0, upsampler=None, base=1.0, masks=RandomMasks(0.75))
    theirs = MAE(
        vit(16, 2, 2, img_size=8, patch_size=2, in_chans=3), MaskDecoder(16, width=8, depth=1, heads=2),
        RandomMasks(0.75), normalise=False, optimizer=torch.optim.SGD,
    )  # fmt: skip
    network = theirs.backbone.network
    with torch.no_grad():
        for name, weight in ours.backbone.blocks.state_dict().items():
            network.blocks.state_dict()[name].copy_(weight)
        network.patch_embed.proj.load_state_dict(ours.backbone.patch_embed.parts[0].proj.state_dict())
        network.cls_token.copy_(ours.backbone.cls_token.view(1, 1, -1))
    for name in ("sequence", "blocks", "norm"):
        getattr(theirs.decoder, name).load_state_dict(getattr(ours.decoder, name).state_dict())
    theirs.decoder.head.load_state_dict(ours.decoder.group_heads[0].state_dict())
    given = batch(3, 8)
    loss = ours.training_step(given, 0)
    expected = theirs.training_step({"views": [given["image"]], "index": given["index"]}, 0)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(
        ours.backbone.patch_embed.parts[0].proj.weight.grad, network.patch_embed.proj.weight.grad, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(ours.features(given), theirs.backbone.tokens(given["image"])[:, 1:].mean(dim=1))


def test_permuting_bands_and_groups_alike_changes_nothing() -> None:
    first, given = method(), batch()
    order = [3, 0, 4, 2, 1]  # band b of the first is at order.index(b) now
    other = method([[order.index(band) for band in group] for group in GROUPS])
    other.load_state_dict(first.state_dict())
    moved = {**given, "image": given["image"][:, order]}
    # The upsampler mixes bands, whose weights then move along.
    with torch.no_grad():
        upsampler = other.upsampler
        assert upsampler is not None
        upsampler.enter.weight.copy_(first.upsampler.enter.weight[:, order])  # type: ignore[union-attr]
        for mine, theirs in zip(upsampler.heads, first.upsampler.heads, strict=True):  # type: ignore[union-attr]
            mine.weight.copy_(theirs.weight[order])
            mine.bias.copy_(theirs.bias[order])
    expected, found = figures(first, given), figures(other, moved)
    assert found == pytest.approx(expected, rel=1e-5)
    # And each band of the guess is in its place.
    torch.testing.assert_close(
        other.reconstruct(moved).guess_BChw, first.reconstruct(given).guess_BChw[:, order], rtol=1e-4, atol=1e-5
    )


def test_the_base_loss_is_that_of_hidden_tokens_in_plain_numpy() -> None:
    model, given = method(), batch()
    image = model.scales(given)[0][0]
    np.testing.assert_allclose(
        image, given["image"].unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean(dim=(3, 5)), atol=1e-6
    )
    see, hide, hidden = model.hidden(image, given["index"])
    guess = model.picture(model.guess(image, see, hide), (3, 4, 4)).detach().numpy()
    errors = []
    for row in range(4):
        for group, bands in enumerate(GROUPS):
            for place in range(16):
                if hidden[row, group, place]:
                    y, x = 2 * (place // 4), 2 * (place % 4)
                    window = (row, list(bands), slice(y, y + 2), slice(x, x + 2))
                    errors.append(((guess[window] - image.numpy()[window]) ** 2).mean())
    assert len(errors) == 4 * 36  # three quarters of 48
    assert figures(model, given)["train/base"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_visible_targets_are_in_the_larger_scales_alone() -> None:
    model, given = method(), batch()
    image = model.scales(given)[0][0]
    see, hide, hidden = model.hidden(image, given["index"])
    guesses = model.guess(image, see, hide)

    def losses(target: Tensor) -> tuple[float, float]:
        model.guess = lambda *ignored: guesses  # type: ignore[method-assign]
        found = figures(model, {**given, "image": target})
        return found["train/base"], found["train/multi_scale"]

    seen_B1hw = (~hidden).all(dim=1).view(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert seen_B1hw.any()
    base, multi = losses(given["image"])
    other_base, other_multi = losses(torch.where(seen_B1hw, given["image"] + 1, given["image"]))
    assert other_base == pytest.approx(base, rel=1e-6)
    assert abs(other_multi - multi) > 1e-3


def test_grown_pictures_have_twice_and_four_times_the_size_and_a_constant_is_not_shifted() -> None:
    model = method()
    small = torch.randn(2, 5, 8, 8)
    assert [made.shape for made in model.grown(small)] == [(2, 5, 16, 16), (2, 5, 32, 32)]
    # A transposed convolution of four pixels with padding 1 is symmetric: mirrored weights grow mirrored pictures.
    pyramid = UpsamplerPyramid(2, 2, 4)
    with torch.no_grad():
        for module in pyramid.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                module.weight.copy_((module.weight + module.weight.flip(-1)) / 2)
    picture = torch.randn(1, 2, 4, 4)
    for made, mirrored in zip(pyramid(picture), pyramid(picture.flip(-1)), strict=True):
        torch.testing.assert_close(mirrored, made.flip(-1), rtol=1e-4, atol=1e-5)


def test_features_are_those_of_the_reduced_picture_and_guesses_stand_in_hidden_places_alone() -> None:
    model, given = method(), batch()
    small = F.avg_pool2d(given["image"], 4)
    torch.testing.assert_close(model.features(given), model.backbone(small))
    found = model.reconstruct(given)
    torch.testing.assert_close(found.image_BChw, small)
    assert torch.equal(found.guess_BChw[~found.hidden_B1hw], found.image_BChw[~found.hidden_B1hw])
    assert not torch.isclose(found.guess_BChw, found.image_BChw)[found.hidden_B1hw].any()


def test_a_picture_is_grown_from_all_of_its_tokens_each_once() -> None:
    model, asked = method(), list[tuple[Tensor, Tensor]]()
    whole = model.guess
    model.guess = lambda image, see, hide: asked.append((see, hide)) or whole(image, see, hide)  # type: ignore[method-assign, func-returns-value]
    model.grown(torch.randn(2, 5, 8, 8))
    ((see, hide),) = asked
    assert torch.equal(see, torch.arange(48).expand(2, -1))
    assert hide.shape == (2, 0)


def test_the_losses_of_larger_scales_are_mean_absolute_errors_over_what_is_valid() -> None:
    model, given = method(), batch()
    given["valid"] = (torch.rand(given["valid"].shape, generator=torch.Generator().manual_seed(3)) < 0.98).long()
    given["image"] = torch.where(given["valid"] > 0, given["image"], 0)
    image = model.scales(given)[0][0]
    see, hide, _ = model.hidden(image, given["index"])
    assert model.upsampler is not None
    grown = model.upsampler(model.picture(model.guess(image, see, hide), (3, 4, 4)))
    middle, seen = area_reduced(given["image"], given["valid"] > 0, 2)
    assert 0.8 < float(seen.float().mean()) < 1
    parts = [(grown[0], middle, seen), (grown[1], given["image"], given["valid"] > 0)]
    errors = [float((made - target)[valid].abs().sum()) / valid.numel() for made, target, valid in parts]
    found = figures(model, given)
    assert found["train/multi_scale"] == pytest.approx(sum(errors) / 2, rel=1e-5)
    assert found["train/loss"] == pytest.approx(0.6 * found["train/base"] + 0.4 * sum(errors) / 2, rel=1e-5)


def test_an_upsampler_has_four_features_a_band_and_its_last_picture_trains_all_but_the_other_heads() -> None:
    pyramid = UpsamplerPyramid(3)
    assert pyramid.enter.out_channels == 12
    pyramid(torch.randn(1, 3, 4, 4))[-1].square().sum().backward()
    assert {name for name, weight in pyramid.named_parameters() if weight.grad is None} == {
        "heads.0.weight",
        "heads.0.bias",
    }


def test_convolutions_of_an_upsampler_start_xavier_uniform_but_for_the_first_and_the_transposed_ones() -> None:
    pyramid = UpsamplerPyramid(3, 2, 32)
    for block, head in zip(pyramid.blocks, pyramid.heads, strict=True):
        for layer in (block.first, block.second, head):
            bound = (6 / (9 * (layer.in_channels + layer.out_channels))) ** 0.5
            assert 0.98 * bound < float(layer.weight.abs().max()) <= bound
            assert not layer.bias.any()
    assert pyramid.enter.bias.any()
    assert pyramid.blocks[0].up.bias.any()


@pytest.mark.parametrize("name", ["satmaepp", "satmaepp_fmow"])
def test_recipes_weigh_standardised_pixels_as_the_source_weighs_pixels_a_quarter_as_large(name: str) -> None:
    given = resolve(f"masked/{name}").config["model"]["init_args"]
    squared, absolute = 4**2, 4
    assert given["multi_scale"] * absolute / (0.6 * squared) == pytest.approx(0.4 / 0.6)
    assert "base" not in given


def test_rows_and_columns_of_a_picture_that_is_no_square_keep_their_places() -> None:
    model = method()
    assert model.backbone.grid(torch.zeros(1, 5, 4, 6)) == (3, 2, 3)
    assert model.backbone.norm.eps == 1e-6
    assert model.backbone.cls_token.detach().std() < 0.05
    wide = torch.randn(2, 5, 16, 24)
    given = {"image": wide, "index": torch.arange(2)}
    assert model.reconstruct(given).guess_BChw.shape == (2, 5, 4, 6)
    assert [made.shape[2:] for made in model.grown(F.avg_pool2d(wide, 4))] == [(8, 12), (16, 24)]


def test_an_upsampler_is_that_of_the_source_step_by_step() -> None:
    torch.manual_seed(0)
    pyramid, x = UpsamplerPyramid(2, 2, 4), torch.randn(2, 2, 4, 4)
    norms = [module for module in pyramid.modules() if isinstance(module, torch.nn.LayerNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.normal_()
            norm.bias.normal_()

    def normed(norm: torch.nn.LayerNorm, of: Tensor) -> Tensor:
        deviation = (of.var(dim=1, keepdim=True, correction=0) + 1e-6).sqrt()
        centred = (of - of.mean(dim=1, keepdim=True)) / deviation
        return centred * norm.weight[:, None, None] + norm.bias[:, None, None]

    state = normed(pyramid.norm, F.gelu(pyramid.enter(x)))
    for block, head, made in zip(pyramid.blocks, pyramid.heads, pyramid(x), strict=True):
        up = F.leaky_relu(normed(block.norm, F.conv_transpose2d(state, block.up.weight, block.up.bias, 2, 1)), 0.01)
        state = normed(block.out, up + 0.5 * block.second(F.relu(block.first(up))))
        torch.testing.assert_close(made, head(state), rtol=1e-4, atol=1e-5)


def test_the_class_token_has_the_code_of_one_further_group_in_the_decoder_and_none_of_a_place() -> None:
    model = method()
    seen: list[Tensor] = []
    model.decoder.blocks.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    tokens, places = torch.randn(1, 1 + 48, 16), torch.arange(48)[None]
    model.decoder(tokens, places, places[:, :0], (3, 4, 4))
    embedded = model.decoder.sequence.embed(tokens)
    expected = torch.zeros(8)
    expected[4:] = sincos((4,), 4)[3]
    torch.testing.assert_close(seen[0][0, 0] - embedded[0, 0], expected)
    torch.testing.assert_close(seen[0][0, 1:] - embedded[0, 1:], sincos_by_axis((3, 4, 4), (4, 2, 2)))


def test_pixels_that_are_not_valid_may_hold_anything_under_the_hidden_tokens() -> None:
    model, given = method(steps=0, upsampler=None), batch(side=8)
    _, _, hidden = model.hidden(given["image"], given["index"])
    covered = model.picture(
        [part[..., None].expand(-1, -1, 4 * len(g)) for part, g in zip(hidden.unbind(1), GROUPS, strict=True)],
        (3, 4, 4),
    )
    given["valid"] = given["valid"] * (torch.rand(given["valid"].shape) < 0.5)
    expected = figures(model, given)["train/base"]
    guess = model.reconstruct(given).guess_BChw
    counted = covered & (given["valid"] > 0)
    sizes = torch.tensor([{band: len(group) for group in GROUPS for band in group}[band] for band in range(5)])
    squares = ((guess - given["image"]) ** 2 / (4 * sizes[:, None, None]))[counted].sum() / hidden.sum()
    assert expected == pytest.approx(float(squares), rel=1e-5)  # of a token all numbers are counted
    spoilt = torch.where(covered & (given["valid"] == 0), 1e4, given["image"])
    assert figures(model, {**given, "image": spoilt})["train/base"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_without_a_valid_pixel_have_no_loss_and_no_gradient(dtype: torch.dtype) -> None:
    model, given = method().to(dtype), batch()
    empty = {**given, "image": torch.zeros_like(given["image"], dtype=dtype), "valid": torch.zeros_like(given["valid"])}
    loss = model.training_step(empty, 0)
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_reduced_picture_is_the_mean_over_what_is_valid_and_valid_where_all_is() -> None:
    image, valid = torch.randn(2, 3, 8, 8), torch.rand(2, 3, 8, 8) < 0.8
    image = torch.where(valid, image, 0)
    made, seen = area_reduced(image, valid, 2)
    for row, band, y, x in np.ndindex(2, 3, 4, 4):
        window = (row, band, slice(2 * y, 2 * y + 2), slice(2 * x, 2 * x + 2))
        values = image[window][valid[window]]
        torch.testing.assert_close(made[row, band, y, x], values.mean() if len(values) else torch.tensor(0.0))
        assert seen[row, band, y, x] == valid[window].all()
    spoilt = area_reduced(torch.where(valid, image, torch.nan), valid, 2)
    assert torch.equal(spoilt[0], made)
    torch.testing.assert_close(area_reduced(image, torch.ones_like(valid), 4)[0], F.avg_pool2d(image, 4))
    thirds = torch.ones(1, 1, 9, 9)
    torch.testing.assert_close(
        area_reduced(thirds, thirds > 0, 3), (torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3) > 0)
    )


def test_masks_may_hide_the_same_places_in_all_groups() -> None:
    model = method(masks=TubeMasks(0.5))
    image = model.scales(batch())[0][0]
    _, _, hidden = model.hidden(image, torch.arange(4))
    assert (hidden == hidden[:, :1]).all()
    _, _, alone = method().hidden(image, torch.arange(4))
    assert not (alone == alone[:, :1]).all()


def test_every_weight_is_trained_and_the_loss_falls(tmp_path: Path) -> None:
    model, given = method(optimizer=partial(torch.optim.AdamW, lr=3e-3)), batch(rows=8)
    model.training_step(given, 0).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    given["image"] = given["image"].cumsum(dim=3) / 6
    losses = fit(model, [given] * 30, tmp_path)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert len(model.token_features(given, [0, -1])) == 2


def test_validation_compares_with_bilinear_enlargement() -> None:
    model, given = method(), batch()
    logged: dict[str, Tensor] = {}
    model.log_dict = lambda of, **options: logged.update(of)  # type: ignore[method-assign, assignment]
    model.validation_step(given, 0)
    enlarged = F.interpolate(F.avg_pool2d(given["image"], 4), (32, 32), mode="bilinear")
    torch.testing.assert_close(logged["val/bilinear_mse"], (enlarged - given["image"]).square().mean())
    assert set(logged) == {"val/grown_mse", "val/bilinear_mse"}
    finest = model.grown(F.avg_pool2d(given["image"], 4))[-1]
    torch.testing.assert_close(logged["val/grown_mse"], (finest - given["image"]).square().mean())
    given["valid"][:, :, :16] = 0
    given["image"][:, :, :16] = 0
    model.validation_step(given, 0)
    enlarged = F.interpolate(F.avg_pool2d(given["image"], 4), (32, 32), mode="bilinear")
    expected = (enlarged - given["image"])[:, :, 16:].square().mean()
    torch.testing.assert_close(logged["val/bilinear_mse"], expected)
    model.validation_step({**given, "valid": given["valid"] * 0}, 0)
    assert logged["val/grown_mse"] == 0


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"groups=\[\[0\], \[0\]\] must have each of the bands 0 to 1 once"):
        method([[0], [0]])
    with pytest.raises(UserError, match="group_width=0 tells 2 groups not apart"):
        method([[0], [1]], group_width=0)
    with pytest.raises(UserError, match="leave a multiple of 4 above 0 of width=16"):
        method(group_width=16)
    with pytest.raises(UserError, match="group_width=3 must be a multiple of 2"):
        method(group_width=3)
    with pytest.raises(UserError, match=r"SatMAEpp steps=2 .* this is one for 5 bands and 1"):
        method(upsampler=UpsamplerPyramid(5, 1))
    decoder = GroupedMaskDecoder(16, width=8, depth=1, heads=2, group_width=4)
    with pytest.raises(UserError, match=r"SatMAEpp steps=-1 must be at least 0 .* this is no upsampler"):
        SatMAEpp(method().backbone, decoder, steps=-1, optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(
        UserError, match=r"a network for 5 bands.*: the backbone's groups, and the upsampler's channels"
    ):
        method().training_step(batch(4), 0)
    for shape in ((4, 5, 4, 32, 32), (4, 32, 32)):
        with pytest.raises(UserError, match=r"does not fit a network for 5 bands, which takes \[B C h w\]"):
            method().training_step({"image": torch.zeros(shape), "index": torch.arange(4)}, 0)
    with pytest.raises(UserError, match="30 x 30 pixels cannot be reduced 4 times"):
        method().training_step(batch(side=30), 0)
    with pytest.raises(UserError, match=r"image \[4, 5, 32, 32\] and valid \[4, 1, 32, 32\]"):
        method().training_step({**batch(), "valid": torch.ones(4, 1, 32, 32)}, 0)
    with pytest.raises(UserError, match="made without"):
        method(upsampler=None).grown(torch.zeros(1, 5, 8, 8))
