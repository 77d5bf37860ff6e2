"""Places in several seasons: which two a sample shows, its tags, and what is wrong with a shard."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_files import array_shard

from lightspan.core.errors import UserError
from lightspan.datamodules.multispectral.bands import Bands
from lightspan.datamodules.multispectral.resampling import SpectralCrops
from lightspan.datamodules.multispectral.seasons import SeasonShards
from lightspan.datamodules.rendered.land import LEAST_SHARE, LandSeasons, cover_shares, days

WHOLE = SpectralCrops(8, scale=(1.0, 1.0), flip=0.0)


def numbered(seasons: int) -> np.ndarray:
    """Season t is t everywhere."""
    return np.arange(float(seasons))[:, None, None, None] + np.zeros((1, 2, 8, 8))


def saved(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def shards(
    folder: Path,
    arrays: list[np.ndarray],
    tags: list[Any] | None = None,
    clouds: list[np.ndarray] | None = None,
    crops: SpectralCrops = WHOLE,
    **settings: Any,
) -> SeasonShards:
    others = {} if tags is None else {"json": [json.dumps(of).encode() for of in tags]}
    others |= {} if clouds is None else {"clouds.npy": [saved(of) for of in clouds]}
    path = array_shard(folder / "s.tar", arrays, **others)
    moments = {"mean": [0.0, 0.0], "std": [1.0, 1.0]}
    data = SeasonShards([path], Bands(["x", "y"]), 3, crops, **moments | settings)
    data.setup()
    return data


def test_two_different_seasons_are_drawn_and_one_alone_is_shown_twice(tmp_path: Path) -> None:
    data = shards(tmp_path, [numbered(1), numbered(4)])
    assert data.train is not None
    found = [[data.train.sample(place, seed)["views"] for seed in range(60)] for place in (0, 1)]
    pairs = [[tuple(round(float(view.mean())) for view in views) for views in of] for of in found]
    assert set(pairs[0]) == {(0, 0)}
    assert set(pairs[1]) == {(a, b) for a in range(4) for b in range(4) if a != b}
    again = data.train.sample(1, 7)["views"]
    assert all(torch.equal(a, b) for a, b in zip(again, found[1][7], strict=True))


def test_tags_that_are_listed_hold_and_a_place_without_tags_has_none(tmp_path: Path) -> None:
    data = shards(tmp_path, [numbered(2)] * 3, [{"present": [0, 2]}, {}, None])
    assert data.train is not None
    assert [data.train.sample(i, 0)["tags"].tolist() for i in range(3)] == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]
    unknown = shards(tmp_path, [numbered(2)], [{"present": [1], "absent": [0]}], complete=False)
    assert unknown.train is not None
    assert unknown.train.sample(0, 0)["tags_known"].tolist() == [1, 1, 0]
    assert shards(tmp_path, [numbered(2)]).bank.sample(0, 0)["tags"].tolist() == [0, 0, 0]


def test_validation_shows_the_first_season_whole(tmp_path: Path) -> None:
    sample = shards(tmp_path, [numbered(3)]).bank.sample(0, 5)
    assert torch.equal(sample["image"], torch.zeros(2, 8, 8))
    assert sample["valid"].shape == (2, 8, 8)


def test_moments_are_those_of_all_seasons_and_standardise_views_and_bank(tmp_path: Path) -> None:
    data = shards(tmp_path, [1 + 2 * numbered(2), 1 + 2 * numbered(2)], mean=None, std=None)
    assert data.decode.moments is not None
    assert [part.tolist() for part in data.decode.moments] == [[2, 2], [1, 1]]
    assert data.train is not None
    assert sorted(float(view.mean()) for view in data.train.sample(0, 0)["views"]) == pytest.approx([-1, 1])
    assert data.bank.sample(0, 0)["image"].mean() == -1


def test_clouds_hide_their_season_from_views_moments_and_bank(tmp_path: Path) -> None:
    clouds = np.zeros((2, 8, 8), np.uint8)
    clouds[0, :, :4], clouds[1] = 1, 1
    seasons = 5 + numbered(2)
    seasons[0, :, :, :4] = 99
    data = shards(tmp_path, [seasons, seasons], clouds=[clouds] * 2, mean=None, std=None)
    assert data.decode.moments is not None
    assert [part.tolist() for part in data.decode.moments] == [[5, 5], [1, 1]]
    assert torch.equal(data.bank.sample(0, 0)["valid"], torch.from_numpy(1 - clouds[0]).long().expand(2, 8, 8))
    plain = shards(tmp_path, [seasons], clouds=[clouds])
    assert plain.train is not None
    views = plain.train.sample(0, 0)["views"]
    assert sorted(float(view.mean()) for view in views) == [0, 2.5]  # all clouds, and half of a 5
    with pytest.raises(UserError, match=r"clouds.npy is of \[8, 8\], and the picture of \[2, 8, 8\]"):
        shards(tmp_path, [seasons], clouds=[clouds[0]]).bank.sample(0, 0)


def test_the_size_of_images_is_taken_before_crops_as_of_other_shards(tmp_path: Path) -> None:
    bordered = np.zeros((1, 2, 8, 16))
    bordered[..., 4:12] = 3  # the square in the middle
    data = shards(tmp_path, [bordered], image_size=8)
    assert data.train is not None
    for view in [*data.train.sample(0, 0)["views"], data.bank.sample(0, 0)["image"]]:
        torch.testing.assert_close(view, torch.full((2, 8, 8), 3.0))


def test_the_two_views_are_cropped_each_by_itself_and_bands_alike(tmp_path: Path) -> None:
    ramp = np.arange(8.0) + np.zeros((1, 2, 8, 8))
    data = shards(tmp_path, [ramp], crops=SpectralCrops(8, scale=(0.2, 0.5), flip=0.0))
    assert data.train is not None
    first, second = data.train.sample(0, 3)["views"]
    assert not torch.allclose(first, second)
    assert torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    ("array", "tags", "message"),
    [
        (np.zeros((2, 3, 8, 8)), {}, r"its shape is \[2, 3, 8, 8\], and seasons are \[T S H W\] of S=2 bands"),
        (np.zeros((0, 2, 8, 8)), {}, r"its shape is \[0, 2, 8, 8\]"),
        (np.zeros((2, 8, 8)), {}, r"its shape is \[2, 8, 8\]"),
        (numbered(2), {"present": [3]}, r"lists of numbers from 0 to num_tags - 1 = 2"),
    ],
)
def test_a_bad_sample_is_named(tmp_path: Path, array: np.ndarray, tags: Any, message: str) -> None:
    data = shards(tmp_path, [array], [tags])
    assert data.train is not None
    with pytest.raises(UserError, match=rf"0000.*{message}"):
        data.train.sample(0, 0)


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_tags=0"):
        SeasonShards(["x.tar"], Bands(["x"]), 0, WHOLE)


def test_rendered_seasons_are_two_of_four_days_of_the_same_land() -> None:
    data = LandSeasons(side=16, scale=(1.0, 1.0), size=16, val_size=4, batch_size=4)
    data.crops.flip = 0.0
    data.setup()
    assert data.train is not None
    numbers = np.arange(5)
    batch = data.train.batch(numbers.tolist(), [3] * 5)
    made = data.land.scenes(0, numbers, days(0, numbers, 4))
    # The crop of a whole scene is square only if the drawn ratio is: compared by the mean of a band.
    means = made.reflectance.mean(axis=(3, 4)).transpose(0, 2, 1)  # [B T C]
    for view in batch["views"]:
        seen = view.mean(dim=(2, 3)) * data.bank.moments.std + data.bank.moments.mean
        near = np.abs(seen.numpy()[:, None] - means).max(axis=2)
        assert (near.min(axis=1) < 0.03).all()
    shares = cover_shares(made.cover)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    np.testing.assert_array_equal(batch["tags"].numpy(), shares >= LEAST_SHARE)
    assert batch["views"][0].shape == (5, 13, 16, 16)
    one = data.train.batch([2], [3])["views"]
    assert all(torch.allclose(a[0], b[2], atol=1e-5) for a, b in zip(one, batch["views"], strict=True))
    assert set(data.bank.sample(0, 0)) >= {"image", "tags", "index"}


def test_the_two_views_of_rendered_land_are_of_different_days_and_mirrored_by_themselves() -> None:
    data = LandSeasons(side=16, scale=(1.0, 1.0), noise=0.0, size=16, val_size=4, test_size=4)
    data.setup()
    assert data.train is not None
    mirrored = []
    for place in range(16):
        first, second = data.train.sample(place, place)["views"]
        assert not torch.allclose(first, second, atol=1e-3)
        assert not torch.allclose(first, second.flip(-1), atol=1e-3)
        distances = [float((first - other).square().mean()) for other in (second, second.flip(-1))]
        mirrored.append(distances[1] < distances[0])
    assert {*mirrored} == {True, False}
