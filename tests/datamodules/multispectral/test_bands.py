"""Bands by name, what their numbers mean, and moments over what was seen."""

import math

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.multispectral.bands import SENSORS, Bands, wavelengths
from lightspan.datamodules.multispectral.moments import band_moments
from lightspan.datamodules.multispectral.resampling import SpectralCrops, resampled, square


def test_sensors_have_their_bands_with_centres_in_nanometres() -> None:
    assert {name: len(bands) for name, bands in SENSORS.items()} == {
        "sentinel-2": 13, "landsat-7": 6, "landsat-8": 8, "hls": 6, "landsat-mss": 4,
    }  # fmt: skip
    assert all(400 < centre < 2500 for bands in SENSORS.values() for centre in bands.values())
    assert wavelengths("sentinel-2", ["B12", "B2"]).tolist() == [2202.4, 492.4]
    with pytest.raises(UserError, match="sentinel-2 has no band B13; its bands are B1, B2"):
        wavelengths("sentinel-2", ["B13"])
    with pytest.raises(UserError, match="the sensor spot is not known; known are sentinel-2"):
        wavelengths("spot")


def test_bands_are_taken_by_name_in_the_order_asked_for() -> None:
    stored = np.arange(13)[:, None, None] * np.ones((13, 2, 2), np.uint16)
    values, valid = Bands("sentinel-2", ["B11", "B2", "B8A"]).reflectance(stored)
    assert (values[:, 0, 0].tolist(), valid.all()) == ([11, 1, 8], True)
    assert values.dtype == np.float32


def test_reflectance_is_what_the_user_says_of_the_stored_numbers() -> None:
    stored = np.array([[[1000, 3500]]], np.uint16)
    values, _ = Bands(["x"], scale=1e-4, offset=-1000).reflectance(stored)
    np.testing.assert_allclose(values, [[[0, 0.25]]], atol=1e-7)
    assert Bands(["x"]).reflectance(stored)[0].tolist() == [[[1000, 3500]]]  # nothing is guessed
    large = np.array([[[2**31 + 1, 2**31]]], np.uint32)
    assert Bands(["x"], offset=-(2.0**31)).reflectance(large)[0].tolist() == [[[1, 0]]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.float32, np.float64])
def test_nodata_is_marked_before_anything_is_made_of_it(dtype: type) -> None:
    stored = np.array([[[0, 7]], [[5, 0]]], dtype)
    values, valid = Bands(["x", "y"], nodata={"x": 0}, offset=3, scale=2).reflectance(stored)
    assert valid.tolist() == [[[False, True]], [[True, True]]]  # the 0 of y is a number like others
    assert values.tolist() == [[[0, 20]], [[16, 6]]]
    assert Bands(["x", "y"], nodata=0).reflectance(stored)[1].tolist() == [[[False, True]], [[True, False]]]


def test_what_is_not_finite_is_never_valid() -> None:
    stored = np.array([[[math.nan, math.inf, -math.inf, 1.0]]])
    values, valid = Bands(["x"], nodata=-9999).reflectance(stored)
    assert (valid.tolist(), values.tolist()) == ([[[False, False, False, True]]], [[[0, 0, 0, 1]]])


@pytest.mark.parametrize("stored", [np.ones((1, 2, 2), np.complex64), np.full((1, 2, 2), "a"), np.ones((1, 0, 2))])
def test_what_is_no_number_and_what_has_no_pixel_is_refused(stored: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"whole numbers and floats are read, of one pixel at least"):
        Bands(["x"]).reflectance(stored)


def test_a_band_that_is_absent_is_an_error_or_marked() -> None:
    with pytest.raises(UserError, match=r"asks for z, which bands.stored .x, y. does not have"):
        Bands(["x", "y"], ["z", "x"])
    values, valid = Bands(["x", "y"], ["z", "x"], fill_absent=True).reflectance(np.ones((2, 1, 1)))
    assert (values.tolist(), valid.tolist()) == ([[[0]], [[1]]], [[[False]], [[True]]])
    with pytest.raises(UserError, match="one at least must be there"):
        Bands(["x"], ["z"], fill_absent=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stored": ["x", "x"]}, r"bands.stored=\['x', 'x'\] must name at least one band, and each once"),
        ({"stored": []}, "at least one band"),
        ({"stored": "hls", "taken": []}, "bands.taken"),
        ({"stored": ["x"], "nodata": {"y": 0}}, "bands.nodata names y"),
        ({"stored": ["x"], "scale": 0.0}, "bands.scale=0.0 must be above 0"),
        ({"stored": ["x"], "sensor": "spot"}, "sensor spot"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Bands(**settings)


def test_pictures_show_the_bands_nearest_to_red_green_and_blue() -> None:
    assert Bands("hls").shown() == (2, 1, 0)
    assert Bands("sentinel-2", ["B8", "B2", "B4", "B3"]).shown() == (2, 3, 1)
    assert Bands(["p", "q", "r", "s"]).shown() == (0, 1, 2)
    assert Bands(["p"]).shown() == (0, 0, 0)
    assert Bands(["B2", "B3", "B4"], sensor="sentinel-2").shown() == (2, 1, 0)


def test_moments_are_those_of_valid_pixels_in_plain_numpy() -> None:
    rng = np.random.default_rng(0)
    pictures = [(rng.normal(3e4, 2, (3, 4, 5)), rng.random((3, 4, 5)) < 0.5) for _ in range(6)]
    pictures = [(np.where(valid, values, 1e9).astype(np.float32), valid) for values, valid in pictures]
    pictures.insert(0, (np.full((3, 4, 5), 1e15), np.zeros((3, 4, 5), bool)))  # of which nothing was seen
    moments = band_moments(pictures, 3)
    for band in range(3):
        seen = np.concatenate([values[band][valid[band]] for values, valid in pictures]).astype(np.float64)
        np.testing.assert_allclose(moments.mean[band], seen.mean(), rtol=1e-6)
        np.testing.assert_allclose(moments.std[band], seen.std(), rtol=1e-5)


def test_a_constant_band_and_one_never_seen_become_zero() -> None:
    values, valid = np.full((2, 3, 3), 0.1, np.float32), np.zeros((2, 3, 3), bool)
    valid[0] = True
    moments = band_moments([(values, valid)], 2)
    made = moments.standardised(torch.from_numpy(values), torch.from_numpy(valid))
    assert torch.equal(made, torch.zeros(2, 3, 3))
    assert torch.equal(moments.std, torch.ones(2))
    assert torch.equal(band_moments([], 2).std, torch.ones(2))
    values[0, 1] = np.nextafter(np.float32(0.1), np.float32(1))  # rounding makes no band vary
    assert torch.equal(band_moments([(values, valid)], 2).std, torch.ones(2))


def test_resampling_is_the_mean_over_what_was_seen_and_shifts_nothing() -> None:
    ramp = torch.arange(16.0).expand(1, 16, 16)
    whole = torch.ones(1, 16, 16, dtype=torch.bool)
    for side in (8, 32):
        made, valid = resampled(ramp, whole, (side, side))
        assert valid.all()
        # In the middle a ramp stays that ramp, at the middles of the new pixels.
        expected = (torch.arange(side) + 0.5) * 16 / side - 0.5
        torch.testing.assert_close(made[0, side // 2, side // 4 : -side // 4], expected[side // 4 : -side // 4])
    holes = whole.clone()
    holes[:, :, :8] = False
    made, valid = resampled(torch.where(holes, 5.0, 0.0), holes, (8, 8))
    assert not valid[..., :3].any()
    assert (made[valid] - 5).abs().max() < 1e-5  # what was not seen darkens nothing
    assert square(ramp[:, :12], whole[:, :12], 6)[0].shape == (1, 6, 6)
    for axis in (1, 2):
        middle = square(ramp.narrow(axis, 0, 10), whole.narrow(axis, 0, 10), 10)[0]
        assert torch.equal(middle, ramp.narrow(axis, 0, 10).narrow(3 - axis, 3, 10))


def test_a_new_pixel_is_valid_where_half_of_its_weight_was_seen_and_what_was_not_has_no_say() -> None:
    values = torch.tensor([[1.0, 7.0], [3.0, 9.0]])[None]
    for seen, expected in (([1, 1, 1, 1], 5.0), ([1, 0, 1, 0], 2.0), ([1, 0, 0, 0], None), ([0, 0, 0, 0], None)):
        valid = torch.tensor(seen).view(1, 2, 2) > 0
        (made,), (is_valid,) = (part.flatten().tolist() for part in resampled(values, valid, (1, 1)))
        assert (is_valid, made) == (expected is not None, pytest.approx(expected or 0.0))
    corner = torch.zeros(1, 8, 8)
    corner[0, 0, 0] = 1
    assert resampled(corner, torch.ones_like(corner) > 0, (2, 2))[0][0, 0, 0] > 0  # all pixels count, not every other


@pytest.mark.parametrize("sides", [(12, 40), (40, 12), (16, 16)])
def test_a_crop_takes_values_and_what_is_valid_from_one_place_within_the_picture(sides: tuple[int, int]) -> None:
    valid = torch.zeros(1, *sides, dtype=torch.bool)
    valid[:, : sides[0] // 2, sides[1] // 3 :] = True
    shares = []
    for seed in range(30):
        made, seen = SpectralCrops(6, (0.1, 0.4))(torch.where(valid, 5.0, 0.0), valid, seed)
        assert made.shape == seen.shape == (1, 6, 6)
        torch.testing.assert_close(made[seen], torch.full_like(made[seen], 5))
        shares.append(float(seen.float().mean()))
    assert min(shares) < 0.2 < 0.8 < max(shares)


def test_crops_are_a_function_of_the_seed_and_alike_for_all_bands_dates_and_what_is_valid() -> None:
    values = torch.rand(1, 1, 20, 24).expand(3, 2, -1, -1).clone()
    valid = torch.ones_like(values, dtype=torch.bool)
    crops = SpectralCrops(8)
    made, seen = crops(values, valid, 5)
    assert made.shape == seen.shape == (3, 2, 8, 8)
    assert torch.equal(made, crops(values, valid, 5)[0])
    assert not torch.equal(made, crops(values, valid, 6)[0])
    assert (made == made[:1, :1]).all()
    never = crops(values, torch.zeros_like(valid), 5)
    assert not never[0].any()
    assert not never[1].any()
    with pytest.raises(UserError, match=r"SpectralCrops size=8 .* scale=\[0.0, 1.0\]"):
        SpectralCrops(8, (0.0, 1.0))


def test_a_mirrored_crop_mirrors_what_is_valid_and_as_often_as_stated() -> None:
    ramp, whole = torch.arange(1.0, 9).expand(1, 8, 8), SpectralCrops(8, scale=(1.0, 1.0))
    valid = ramp > 3
    mirrored = 0
    for seed in range(100):
        made, seen = whole(torch.where(valid, ramp, 0), valid, seed)
        assert not made[~seen].any()
        assert seen.any()
        assert made[seen].min() > 3
        mirrored += bool(seen[0, 0, 0])
    assert 30 < mirrored < 70
    for flip, last in ((0.0, True), (1.0, False)):
        assert bool(SpectralCrops(8, (1.0, 1.0), flip)(ramp, valid, 0)[1][0, 0, -1]) is last
