"""Rendered land: known spectra, scenes as a function of seed, number and day, and clouds that are known."""

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.multispectral.bands import wavelengths
from lightspan.datamodules.rendered.draws import Draws
from lightspan.datamodules.rendered.land import LEAST_SHARE, LandScenes, LandSeries, days, fractal
from lightspan.datamodules.rendered.spectra import ANCHORS, MATERIALS, season, spectra

TEN = ["B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12"]


def scenes(**settings: object) -> LandScenes:
    data = LandScenes(**{"side": 16, "bands": TEN, "size": 64, "batch_size": 8} | settings)  # type: ignore[arg-type]
    data.setup()
    return data


def test_spectra_go_through_their_points_and_turn_nowhere_else() -> None:
    low, high = spectra(ANCHORS)
    fine = spectra(np.linspace(ANCHORS[0], ANCHORS[-1], 2000))
    assert all(part.min() > 0 and part.max() < 1 for part in fine)
    for listed, smooth in zip((low, high), fine, strict=True):
        np.testing.assert_allclose(smooth.max(axis=1), listed.max(axis=1), rtol=1e-3)
        np.testing.assert_allclose(smooth.min(axis=1), listed.min(axis=1), rtol=1e-3)
        assert np.abs(np.diff(smooth, axis=1)).max() < 0.02  # no jumps
    red, near_infrared = spectra([665, 865])[1].T
    index = (near_infrared - red) / (near_infrared + red)
    named = dict(zip(MATERIALS, index.tolist(), strict=True))
    assert min(named["trees"], named["grass"], named["crops"]) > 0.8
    assert max(named["built"], named["bare"], named["water"]) < 0.3


def test_seasons_are_circular_and_highest_on_their_day() -> None:
    trees, snow = MATERIALS.index("trees"), MATERIALS.index("snow")
    assert season(np.array(trees), np.array(200.0)) == 1
    assert season(np.array(snow), np.array(364.0)) == season(np.array(snow), np.array(-1.0)) > 0.9
    np.testing.assert_allclose(season(np.array(trees), np.array([140.0, 260.0])), np.exp(-0.5), rtol=1e-6)


def test_a_scene_is_a_function_of_seed_number_and_day_alone() -> None:
    data = scenes()
    whole = data.train.batch(range(40), [0] * 40)
    part = data.train.batch([33, 5], [1, 2])
    for name, values in part.items():
        torch.testing.assert_close(values, whole[name][[33, 5]], rtol=0, atol=1e-5)
    assert not torch.equal(scenes(draw_seed=1).train.batch([5], [0])["image"], part["image"][1:])
    assert not torch.equal(data.val.batch([5], [0])["image"], part["image"][1:])


def test_the_day_changes_what_grows_and_not_where() -> None:
    land, numbers = scenes(noise=0.0).land, np.arange(20)
    early, late = (land.scenes(0, numbers, np.full((20, 1), day, np.float32)) for day in (20, 180))
    np.testing.assert_array_equal(early.cover, late.cover)
    near_infrared = TEN.index("B8A")
    crops = early.cover == MATERIALS.index("crops")
    brighter = (late.reflectance - early.reflectance)[:, near_infrared, 0]
    assert brighter[crops].mean() > 0.1
    assert abs(brighter[early.cover == MATERIALS.index("built")].mean()) < 0.1


def test_mixtures_sum_to_one_and_fields_hold_mostly_their_own_material() -> None:
    land = scenes(side=32).land
    made = land.scenes(0, np.arange(40), np.full((40, 1), 150, np.float32))
    np.testing.assert_allclose(made.share.sum(axis=1), 1, atol=1e-5)
    own = np.take_along_axis(made.share, made.cover[:, None], axis=1)[:, 0]
    assert own[made.cover != MATERIALS.index("built")].mean() > 0.8
    assert 0.2 < own[made.cover == MATERIALS.index("built")].mean() < 0.7  # gardens between roads and houses


def test_without_weather_and_texture_a_pure_pixel_has_its_spectrum() -> None:
    land = scenes(materials=["bare"], noise=0.0).land
    made = land.scenes(3, np.arange(30), np.full((30, 1), 202.5, np.float32))  # half a year from its height
    expected = spectra(wavelengths("sentinel-2", TEN))[0][MATERIALS.index("bare")]
    middle = np.median(made.reflectance[:, :, 0], axis=(0, 2, 3))
    np.testing.assert_allclose(middle, expected, rtol=0.15)
    assert np.corrcoef(middle, expected)[0, 1] > 0.995


def test_tags_and_label_are_those_of_the_land_cover() -> None:
    batch = scenes().train.batch(range(64), [0] * 64)
    for cover, tags, label in zip(batch["cover"], batch["tags"], batch["label"], strict=True):
        share = torch.bincount(cover.flatten(), minlength=9) / cover.numel()
        assert torch.equal(tags, (share >= LEAST_SHARE).long())
        assert share[label] == share.max()
    assert {1, 2, 3, 4} <= {*batch["tags"].sum(dim=1).tolist()} <= {1, 2, 3, 4, 5}
    assert (batch["tags"].sum(dim=0) > 0).all()
    assert batch["tags_known"].all()


def test_clouds_hide_what_they_cover_in_one_date_and_nothing_else() -> None:
    data = LandSeries(side=24, size=64)
    data.setup()
    batch = data.train.batch(range(64), [0] * 64)
    hidden = batch["valid"] == 0
    assert (hidden == hidden[:, :1]).all()
    assert (hidden[:, 0].flatten(2).any(dim=2).sum(dim=1) == 1).all()
    share = hidden[:, 0].float().mean(dim=(2, 3)).sum(dim=1)
    assert 0.15 < share.min() < share.max() < 0.65
    assert not batch["image"][hidden].any()
    assert torch.equal(batch["image"][~hidden], batch["clear"][~hidden])
    assert batch["clear"][hidden].abs().mean() > 0.1
    assert (batch["day"].diff(dim=1) > 0).all()


def test_moments_leave_out_what_clouds_hide() -> None:
    with_clouds, without = LandSeries(side=16, size=256, val_size=8), LandSeries(side=16, size=256, clouds=0.0)
    with_clouds.setup()
    without.setup()
    seen = with_clouds.train.batch(range(128), [0] * 128)
    valid = seen["valid"] > 0
    for band in range(6):
        values = seen["image"][:, band][valid[:, band]]
        assert abs(values.mean()) < 1e-3
        assert abs(values.std() - 1) < 1e-3
    assert without.train.batch([0], [0])["valid"].all()


def test_fields_have_mean_0_and_deviation_1_and_are_smooth() -> None:
    fields = fractal(Draws(0, np.arange(300), 1), 2, 32)
    assert abs(fields.mean()) < 0.1
    assert 0.85 < fields.std() < 1.15
    assert np.diff(fields, axis=-1).std() < 0.4 * fields.std()


def test_days_lie_in_the_year_and_in_their_part_of_it() -> None:
    single, series = days(0, np.arange(500), None), days(0, np.arange(500), 3)
    assert 0 <= single.min() < 10 < 355 < single.max() < 365
    assert (series[:, 1:] > series[:, :-1]).all()
    assert 45 <= series.min() < series.max() <= 320


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"materials": ["sand"]}, r"materials=\['sand'\] must name some of water, trees"),
        ({"materials": []}, "materials"),
        ({"side": 4}, "side=4"),
        ({"clouds": 1.5}, "clouds=1.5"),
        ({"bands": ["B99"]}, "B99"),
        ({"sensor": "spot"}, "spot"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LandScenes(**settings)
    with pytest.raises(UserError, match="dates=0"):
        LandSeries(dates=0)
