"""Prithvi: MAE as the case of one date, patches and positions of three axes, what is valid, and gaps filled."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from method_runs import SILENT, Served, fit
from torch import Tensor, nn

from lightspan.backbones.placed_vit import SeriesViT, series_widths
from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.evaluation.scores.gap_filling import between_dates
from lightspan.methods.masked.mae import MAE
from lightspan.methods.masked.prithvi import Prithvi
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.decoders.series_neck import SeriesNeck
from lightspan.nn.masking.cloud_masks import CloudMasks
from lightspan.nn.masking.mask_samplers import RandomMasks
from lightspan.nn.sequences.patches import patchify, unpatchify
from lightspan.nn.sequences.positions import sincos, sincos_by_axis


def method(frames: int = 1, bands: int = 2, **settings: Any) -> Prithvi:
    torch.manual_seed(0)
    backbone = SeriesViT(bands, 16, 2, 2, patch_size=3, frames=frames)
    decoder = MaskDecoder(16, width=16, depth=1, heads=2, axis_widths=series_widths(16))
    return Prithvi(backbone, decoder, **{"optimizer": partial(torch.optim.SGD, lr=0.1)} | settings)


def batch(dates: int = 3, sides: tuple[int, int] = (12, 9), rows: int = 4, bands: int = 2) -> dict[str, Any]:
    image = torch.randn(rows, bands, dates, *sides, generator=torch.Generator().manual_seed(1))
    return {"image": image, "valid": torch.ones_like(image, dtype=torch.int64), "index": torch.arange(rows) + 7}


@pytest.mark.parametrize("dates", [1, 2, 3, 4])
def test_patches_go_there_and_back_bit_by_bit(dates: int) -> None:
    image = torch.randn(2, 5, dates, 6, 9)
    for frames in (1, dates):
        patch = (frames, 3, 3)
        grid = (dates // frames, 2, 3)
        assert torch.equal(unpatchify(patchify(image, patch), patch, grid), image)


def test_positions_share_what_they_should() -> None:
    table = sincos_by_axis((3, 4, 5), series_widths(32)).view(3, 4, 5, 32)
    assert (table[..., :24] == table[:1, ..., :24]).all()  # row and column, whatever the time
    assert (table[..., 24:] == table[:, :1, :1, 24:]).all()  # the time, wherever
    assert (table[..., :12] == table[:1, :1, :, :12]).all()  # the column is first
    assert len({tuple(row.tolist()) for row in table.view(60, 32)}) == 60
    torch.testing.assert_close(table[0, 0, :, :12], sincos((5,), 12))
    torch.testing.assert_close(table[:, 0, 0, 24:], sincos((3,), 8))
    torch.testing.assert_close(sincos_by_axis((2, 3), (8, 8), prefix=1), sincos((2, 3), 16, prefix=1))
    torch.testing.assert_close(sincos_by_axis((2, 3, 4), (0, 4, 4)), sincos((3, 4), 8).repeat(2, 1))
    for widths in ((4, 4), (0, 0, 0), (-2, 4, 4)):
        with pytest.raises(UserError, match="need as many widths"):
            sincos_by_axis((1, 2, 3), widths)


class At(nn.Module):
    """Stands for a decoder's sequence, with the positions of a table."""

    def __init__(self, sequence: nn.Module, table: Tensor) -> None:
        super().__init__()
        self.sequence, self.table = sequence, table

    def forward(self, tokens: Tensor, at: Tensor, ask: Tensor, grid: Any) -> Tensor:
        seen, prefix = self.sequence.embed(tokens), tokens.shape[1] - at.shape[1]
        masks = self.sequence.mask_token + self.table[ask]
        return torch.cat([seen[:, :prefix], seen[:, prefix:] + self.table[at], masks], dim=1)


def test_one_date_is_mae_with_the_same_weights() -> None:
    ours = method(masks=RandomMasks(0.75))
    theirs = MAE(
        vit(16, 2, 2, img_size=12, patch_size=3, in_chans=2), MaskDecoder(16, width=16, depth=1, heads=2),
        RandomMasks(0.75), normalise=False, optimizer=torch.optim.SGD,
    )  # fmt: skip
    network, table = theirs.backbone.network, sincos_by_axis((1, 4, 4), series_widths(16))
    with torch.no_grad():
        network.blocks.load_state_dict(ours.backbone.blocks.state_dict())
        network.patch_embed.proj.weight.copy_(ours.backbone.patch_embed.proj.weight.squeeze(2))
        network.patch_embed.proj.bias.copy_(ours.backbone.patch_embed.proj.bias)
        network.cls_token.copy_(ours.backbone.cls_token.view(1, 1, -1))
        network.pos_embed.copy_(torch.cat([torch.zeros(1, 16), table])[None])
    theirs.decoder.load_state_dict(ours.decoder.state_dict())
    theirs.decoder.sequence = At(theirs.decoder.sequence, table)  # type: ignore[assignment]
    given = batch(1, (12, 12))
    views = {"views": [given["image"].squeeze(2)], "index": given["index"]}
    # A draw depends on the number of patches alone, so both hide the same.
    torch.testing.assert_close(ours.training_step(given, 0), theirs.training_step(views, 0), rtol=1e-5, atol=1e-6)


def test_as_many_patches_are_hidden_as_the_ratio_says_and_0_hides_none(tmp_path: Path) -> None:
    model, given = method(), batch()
    hidden = model.hidden(given["image"], given["index"])
    assert hidden.grid == (3, 4, 3)
    assert hidden.hide_BM.shape == (4, 27)  # three quarters of 36
    nothing = method(masks=RandomMasks(0.0))
    assert nothing.hidden(given["image"], given["index"]).hide_BM.shape == (4, 0)
    assert fit(nothing, [given], tmp_path) == [0.0]


def test_the_loss_reads_hidden_valid_pixels_alone_and_divides_by_all_hidden_ones() -> None:
    model, given = method(), batch()
    given["valid"] = (torch.rand(given["image"].shape, generator=torch.Generator().manual_seed(2)) < 0.6).long()
    hidden = model.hidden(given["image"], given["index"])
    guess = model.guess(given["image"], hidden.see_BK, hidden.hide_BM)
    patch = (1, 3, 3)
    full = patchify(given["image"], patch).detach().numpy().copy()
    seen, errors, count = patchify(given["valid"], patch).numpy() > 0, 0.0, 0
    for row in range(4):
        for number, place in enumerate(hidden.hide_BM[row].tolist()):
            difference = guess[row, number].detach().numpy() - full[row, place]
            errors, count = errors + (difference**2)[seen[row, place]].sum(), count + len(difference)
    model.guess = lambda *ignored: guess  # type: ignore[method-assign]
    assert float(model.training_step(given, 0)) == pytest.approx(errors / count, rel=1e-5)
    covered = hidden.reconstruction(torch.zeros_like(guess)).hidden_B1hw
    other = torch.where(covered & (given["valid"] > 0), given["image"], 1e3)
    assert float(model.training_step({**given, "image": other}, 0)) == pytest.approx(errors / count, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_series_without_a_valid_pixel_has_no_loss(dtype: torch.dtype) -> None:
    model, given = method().to(dtype), batch()
    loss = model.training_step({**given, "image": given["image"].to(dtype), "valid": given["valid"] * 0}, 0)
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_what_stands_where_nothing_is_valid_does_not_matter() -> None:
    given = batch()
    given["valid"][0, :, 1] = 0
    losses = []
    for value in (0.0, torch.nan, torch.inf):
        model, image = method(), given["image"].masked_fill(given["valid"] == 0, value)
        model.log_training = lambda figures: None  # type: ignore[method-assign]
        losses.append(model.training_step({**given, "image": image}, 0))
    assert losses[0].isfinite()
    assert losses[0] == losses[1] == losses[2]


def test_gaps_are_filled_from_what_is_seen_and_nothing_else_changes() -> None:
    model, given = method(), batch(rows=5)
    given["valid"][0, :, 1, 2:7, 3:5] = 0
    given["valid"][1, 0, 2, 0, 0] = 0
    given["valid"][2] = 0  # nothing is seen
    given["valid"][3, :, 0, 2:7, 3:5] = 0
    made, gap = model.fill(given), given["valid"] == 0
    assert torch.equal(made[~gap], given["image"][~gap])
    assert torch.equal(made[2], given["image"][2])
    # What stands in a gap, or elsewhere in its patches, has no say.
    spoilt = torch.where(gap, 1e3, given["image"])
    again = model.fill({**given, "image": spoilt})
    torch.testing.assert_close(again[gap][: gap[:2].sum()], made[gap][: gap[:2].sum()])
    alone = model.fill({name: field[3:4] for name, field in given.items()})
    torch.testing.assert_close(alone[0], made[3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(made[0][gap[0]], given["image"][0][gap[0]])


def test_interpolation_is_numpys() -> None:
    generator = np.random.default_rng(0)
    image, valid = generator.normal(size=(3, 2, 5, 4, 4)), generator.random((3, 2, 5, 4, 4)) < 0.6
    day = np.sort(generator.uniform(0, 365, (3, 5)), axis=1)
    made = between_dates(*map(torch.from_numpy, (image, valid, day))).numpy()
    for b, c, y, x in np.ndindex(3, 2, 4, 4):
        seen = valid[b, c, :, y, x]
        expected = np.interp(day[b], day[b][seen], image[b, c, seen, y, x]) if seen.any() else np.zeros(5)
        np.testing.assert_allclose(made[b, c, :, y, x], expected, rtol=1e-9, atol=1e-12)


def test_dates_of_one_day_are_interpolated_by_the_first_of_them() -> None:
    image, valid = torch.tensor([1.0, 0.0, 5.0]).view(1, 1, 3, 1, 1), torch.tensor([True, False, True])
    made = between_dates(image, valid.view(1, 1, 3, 1, 1), torch.full((1, 3), 40.0))
    assert made.flatten().tolist() == [1, 1, 5]


def test_interpolation_in_half_precision_knows_each_day() -> None:
    image = torch.zeros(1, 1, 3, 1, 1, dtype=torch.bfloat16)
    image[0, 0, 2], valid = 8, torch.tensor([True, False, True]).view(1, 1, 3, 1, 1)
    made = between_dates(image, valid, torch.tensor([[300.0, 301.0, 304.0]]))
    assert made.dtype == torch.bfloat16
    assert made.flatten().tolist() == [0, 2, 8]


def test_validation_logs_errors_over_gaps_alone() -> None:
    model, given = method(), with_gaps()
    logged: dict[str, Tensor] = {}
    model.log_dict = lambda of, **options: logged.update(of)  # type: ignore[method-assign, assignment]
    model.validation_step(given, 0)
    gap = given["valid"] == 0
    torch.testing.assert_close(logged["val/gap_mse_mean"], given["clear"][gap].square().mean())
    middle = (given["clear"][:, :, 0] + given["clear"][:, :, 2]) / 2 - given["clear"][:, :, 1]
    torch.testing.assert_close(logged["val/gap_mse_interpolated"], middle[:, :, :3].square().mean())
    torch.testing.assert_close(logged["val/gap_mse"], (model.fill(given) - given["clear"])[gap].square().mean())


def with_gaps(rows: int = 4) -> dict[str, Any]:
    given = batch(rows=rows)
    given |= {"clear": given["image"], "day": torch.tensor([[1.0, 5.0, 9.0]] * rows)}
    given["valid"][:, :, 1, :3] = 0
    given["image"] = torch.where(given["valid"] > 0, given["image"], 0)
    return given


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
def test_a_batch_weighs_in_validation_as_much_as_it_has_gaps(precision: Any, tmp_path: Path) -> None:
    small, large, none = with_gaps(1), with_gaps(), with_gaps()
    small["clear"], large["clear"] = small["clear"] + 40, large["clear"] + 30
    none["valid"][:] = 1
    none["image"] = none["clear"]
    trainer = Trainer(
        **SILENT, precision=precision, accelerator="cpu", enable_checkpointing=False, default_root_dir=tmp_path
    )
    (found,) = trainer.validate(method(), Served([small, none, large]), verbose=False)
    expected = sum(float(of["clear"][of["valid"] == 0].square().sum()) for of in (small, large)) / (5 * 2 * 3 * 9)
    assert found["val/gap_mse_mean"] == pytest.approx(expected, rel=1e-6 if precision == "32-true" else 5e-3)
    (nothing,) = trainer.validate(method(), Served([none]), verbose=False)
    assert all(math.isnan(figure) for figure in nothing.values())  # no gap, no figure


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        ({"clear": torch.zeros(4, 2, 12, 9)}, r"clear, the truth under clouds, which is \[4, 2, 12, 9\] in this batch"),
        ({"day": None}, r"by day, numbers \[4, 3\] that rise along a series, and this batch has None"),
        ({"day": torch.zeros(4, 2)}, r"by day, numbers \[4, 3\]"),
        ({"day": torch.tensor([[1.0, 9.0, 5.0]] * 4)}, r"has \[\[1\.0, 9\.0, 5\.0\], .* the dates in their order"),
        ({"valid": torch.ones(4, 2, 3, 12)}, r"valid \[4, 2, 3, 12\]"),
    ],
)
def test_validation_batches_that_do_not_fit_are_refused(spoilt: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        method().validation_step(with_gaps() | spoilt, 0)


@pytest.mark.parametrize("real", [False, True])
def test_clouds_cover_one_date_with_equal_counts_and_hang_on_step_and_number(tmp_path: Path, real: bool) -> None:
    masks = np.zeros((2, 20, 30), bool)
    masks[0, :10], masks[1, :, 15:] = True, True
    np.save(tmp_path / "clouds.npy", masks)
    sampler = CloudMasks(0.4, 0.5, str(tmp_path / "clouds.npy") if real else None, seed=3)
    drawn = sampler.draw((3, 8, 6), 5, range(40))
    counts = drawn.sum(axis=(1, 2, 3))
    assert len(set(counts)) == 1
    assert 19 <= counts[0] <= 24
    assert (drawn.any(axis=(2, 3)).sum(axis=1) == 1).all()
    assert set(drawn.any(axis=(2, 3)).argmax(axis=1)) == {0, 1, 2}
    np.testing.assert_array_equal(sampler.draw((3, 8, 6), 5, [17, 4]), drawn[[17, 4]])
    assert not np.array_equal(sampler.draw((3, 8, 6), 6, [17]), drawn[[17]])
    assert not np.array_equal(sampler.draw((3, 8, 6), 5, [17], view=1), drawn[[17]])
    if real:
        for mask in drawn:
            one = mask.any(axis=0)
            assert one[:4].all() or one[:, 3:].all() or one[:4].sum() == one.sum() or one[:, 3:].sum() == one.sum()


def test_clouds_hang_on_the_seed_come_from_all_masks_and_ties_are_broken_at_random(tmp_path: Path) -> None:
    drawn = [CloudMasks(0.5, 0.5, seed=seed).draw((1, 8, 8), 0, range(4)) for seed in (0, 1)]
    assert not np.array_equal(*drawn)
    masks = np.zeros((2, 8, 8))
    masks[0, :4] = 1
    np.save(tmp_path / "clouds.npy", masks)  # the second is the same everywhere
    real = CloudMasks(0.5, 0.5, str(tmp_path / "clouds.npy")).draw((1, 8, 8), 0, range(40))[:, 0]
    of_first = (real == (masks[0] > 0)).all(axis=(1, 2))
    assert 10 < of_first.sum() < 30
    assert len({mask.tobytes() for mask in real[~of_first]}) == (~of_first).sum()


def test_clouds_that_cannot_be_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.zeros((4, 4)))
    for settings, message in (
        ({"least": 0.0}, "least=0.0"),
        ({"least": 0.9, "most": 0.5}, "the smaller first"),
        ({"clouds": str(tmp_path / "none.npy")}, "cannot be read"),
        ({"clouds": str(tmp_path / "flat.npy")}, r"masks are numbers \[N h w\]"),
    ):
        with pytest.raises(UserError, match=message):
            CloudMasks(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"this is \[4, 4\]"):
        CloudMasks().draw((4, 4), 0, [0])


def test_drawn_clouds_are_smooth_and_real_ones_hide_where_they_are_thickest(tmp_path: Path) -> None:
    drawn = CloudMasks(0.5, 0.5).draw((1, 16, 16), 0, range(50))[:, 0]
    borders = (drawn[:, 1:] != drawn[:, :-1]).mean()
    assert borders < 0.2  # half of all where patches are drawn one by one
    np.save(tmp_path / "clouds.npy", np.arange(16.0).reshape(1, 4, 4))
    (one,) = CloudMasks(0.5, 0.5, str(tmp_path / "clouds.npy")).draw((1, 4, 4), 0, [0])
    np.testing.assert_array_equal(one[0], np.arange(16).reshape(4, 4) >= 8)
    assert CloudMasks(1.0, 1.0).draw((1, 2, 2), 0, [0]).sum() == 3  # a patch of a single date stays
    assert CloudMasks(0.01, 0.01).draw((2, 4, 4), 0, [0]).sum() == 1  # and one is hidden at least


def test_the_stages_of_a_neck_are_those_of_the_source() -> None:
    kinds = [type(layer).__name__ for layer in SeriesNeck(4, 2, 3).layers]
    stage = ["ConvTranspose2d", "ChannelNorm", "GELU", "ConvTranspose2d"]
    assert kinds == [*stage, *stage, "Conv2d", "ChannelNorm", "ReLU", "Conv2d"]
    torch.manual_seed(0)
    # A token reaches its own pixels, and through the head's convolution those beside them.
    neck, tokens = SeriesNeck(4, 2, 3, doublings=1), torch.randn(1, 2 * 5 * 7, 4)
    other = tokens.clone()
    other[0, 35 + 2 * 7 + 4] += 1  # of the second date, row 2, column 4
    changed = (neck(tokens, (2, 5, 7), (10, 14)) != neck(other, (2, 5, 7), (10, 14)))[0].any(dim=0)
    assert changed.nonzero().aminmax(dim=0).min.tolist() == [3, 7]
    assert changed.nonzero().aminmax(dim=0).max.tolist() == [6, 10]


def test_dates_stand_one_after_the_other_in_channels_and_the_rest_of_the_way_is_bilinear() -> None:
    neck, tokens, seen = SeriesNeck(4, 2, 3, doublings=1), torch.randn(2, 2 * 5 * 7, 4), list[Tensor]()
    assert neck.layers[0].out_channels == 4
    neck.layers[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    logits = neck(tokens, (2, 5, 7), (20, 28))
    maps = tokens.view(2, 2, 5, 7, 4)
    assert torch.equal(seen[0], torch.cat([maps[:, 0], maps[:, 1]], dim=3).movedim(3, 1))
    expected = torch.nn.functional.interpolate(neck.layers(seen[0]), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(logits, expected)


def test_a_neck_gives_a_class_to_each_pixel_and_dates_their_own_channels() -> None:
    model, given = method(), batch()
    neck = SeriesNeck(16, 3, 5, width=8, doublings=1)
    tokens = model.backbone.tokens(given["image"])[:, 1:]
    logits = neck(tokens, (3, 4, 3), (12, 9))
    assert logits.shape == (4, 5, 12, 9)
    assert not torch.allclose(logits, neck(tokens.unflatten(1, (3, 12)).flip(1).flatten(1, 2), (3, 4, 3), (12, 9)))
    assert SeriesNeck(16, 1, 2, doublings=4)(torch.zeros(1, 4, 16), (1, 2, 2), (32, 32)).shape == (1, 2, 32, 32)
    with pytest.raises(UserError, match="SeriesNeck is for 3 dates of 16 features, and these are 2"):
        neck(tokens[:, :24], (2, 4, 3), (12, 9))
    (layer,) = model.token_features(given, [-1])
    assert layer.tokens_BTD.shape == (4, 36, 16)
    assert layer.grid == (3, 4, 3)


def test_any_number_of_dates_and_any_size_fit_and_training_lowers_the_loss(tmp_path: Path) -> None:
    model = method(optimizer=partial(torch.optim.AdamW, lr=3e-3))
    for dates, sides in ((1, (12, 9)), (4, (6, 15))):
        assert model.training_step(batch(dates, sides), 0).isfinite()
    given = batch(rows=8)
    given["image"] = given["image"].cumsum(dim=4) / 3
    losses = fit(model, [given] * 30, tmp_path)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert model.features(given).shape == (8, 16)
    assert [part.shape for part in model.reconstruct(given)[:3]] == [
        (8, 2, 3, 12, 9),
        (8, 1, 3, 12, 9),
        (8, 2, 3, 12, 9),
    ]  # type: ignore[union-attr]


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="width=24 must be a multiple of 16"):
        SeriesViT(2, 24, 1, 2)
    with pytest.raises(UserError, match=r"a batch of \[4, 2, 12, 9\] does not fit .* takes \[B C T h w\]"):
        method().training_step({"image": torch.zeros(4, 2, 12, 9), "index": torch.arange(4)}, 0)
    with pytest.raises(UserError, match="cannot be cut into patches of 2 x 3 x 3"):
        method(frames=2).training_step(batch(3), 0)
    with pytest.raises(UserError, match=r"axis_widths=\[4, 4, 4\] must sum to width=16"):
        MaskDecoder(16, 4, 16, 1, 2, axis_widths=(4, 4, 4))
    with pytest.raises(UserError, match="has no mask token"):
        method().backbone.tokens(batch()["image"], mask_BHW=torch.zeros(4, 3, 4, 3, dtype=torch.bool))
