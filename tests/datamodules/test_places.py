"""Pictures and where they were taken: which are near, pairs as functions of their seed, folders, and names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_files import pixels
from PIL import Image

from lightspan.core.errors import UserError
from lightspan.datamodules.image.places import PlaceFolder, Places, place_in_name


def write(folder: Path, part: str, east: list[float], zone: str = "32@U") -> None:
    (folder / part).mkdir(parents=True, exist_ok=True)
    for number, metres in enumerate(east):
        name = f"@{500000 + metres:.2f}@5800000.00@{zone}@@@{number}@.jpg"
        Image.fromarray(pixels(number, 20, 24)).save(folder / part / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "train/database", [0, 6, 100])
    write(tmp_path, "train/queries", [3, 50, 101])
    write(tmp_path, "train/queries", [103], zone="33@U")
    write(tmp_path, "val/database", [0, 10])
    write(tmp_path, "val/queries", [1])
    return tmp_path


def data_of(folder: Path, **settings: Any) -> PlaceFolder:
    data = PlaceFolder(str(folder), image_size=16, **{"batch_size": 2} | settings)
    data.setup()
    return data


def test_near_is_that_of_loops_over_regions() -> None:
    draws = np.random.default_rng(0)
    place, region, query = draws.uniform(0, 30, (60, 2)), draws.integers(3, size=60), draws.random(60) < 0.4
    expected = [
        [j for j in range(60) if not query[j] and region[i] == region[j] and np.hypot(*(place[i] - place[j])) <= 8]
        for i in np.flatnonzero(query)
    ]
    found = Places(lambda number: torch.zeros(0), place, region, query).near(8.0)
    assert [rows.tolist() for rows in found] == expected


def test_a_pair_is_a_query_and_a_picture_near_it_and_a_function_of_its_seed(folder: Path) -> None:
    data = data_of(folder)
    assert data.train is not None
    assert len(data.train) == 2  # nothing is near the second query, and the last one is in another zone
    drawn = {float(data.train.sample(0, seed)["places"][1, 0]) for seed in range(20)}
    assert len(drawn) == 2
    one, again = data.train.sample(0, 3), data.train.sample(0, 3)
    assert all(torch.equal(a, b) for a, b in zip(one["views"], again["views"], strict=True))
    for sample in (data.train.sample(number, seed) for number in range(2) for seed in range(5)):
        assert (sample["places"][0] - sample["places"][1]).norm() <= 10
    batch = next(iter(data.train_dataloader()))
    assert [view.shape for view in batch["views"]] == [(2, 3, 16, 16)] * 2
    assert batch["places"].shape == (2, 2, 2)


def test_validation_has_each_picture_with_its_place_and_whether_it_asks(folder: Path) -> None:
    batches = list(data_of(folder, batch_size=3).val_dataloader())
    (batch,) = batches
    assert batch["query"].tolist() == [0, 0, 1]
    assert (batch["place"][0] - batch["place"][1]).norm() == 10
    assert (batch["place"][2] - batch["place"][0]).norm() == 1
    assert batch["place"].dtype == torch.float32


def test_other_pictures_or_places_are_another_training_set(folder: Path) -> None:
    first = data_of(folder).training_content()
    assert data_of(folder).training_content() == first
    write(folder, "train/queries", [7.5])
    assert data_of(folder).training_content() != first


def test_another_picture_of_the_same_name_is_another_training_set_and_another_place_of_the_folder_is_none(
    folder: Path,
) -> None:
    first = data_of(folder).training_content()
    moved = folder.rename(folder.with_name("moved"))
    assert data_of(moved).training_content() == first
    picture = next((moved / "train" / "queries").iterdir())
    Image.fromarray(pixels(9, 30, 30)).save(picture)
    assert data_of(moved).training_content() != first


def test_names_tell_places(tmp_path: Path) -> None:
    assert place_in_name(Path("@0549.9@-4180.25@17@T@40.4@-79.9@x@@@@.jpg")) == (549.9, -4180.25, "17T")
    assert place_in_name(Path("@1@2@.jpg")) == (1.0, 2.0, "")
    for name in ("a.jpg", "@x@2@.jpg", "@nan@2@.jpg", "@1.jpg"):
        with pytest.raises(UserError, match="EAST"):
            place_in_name(Path(name))


def test_what_cannot_be_trained_on_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="near"):
        data_of(folder, near=0.5)
    with pytest.raises(UserError, match="near"):
        data_of(folder, near=0.0)
    with pytest.raises(UserError, match="folder"):
        data_of(folder / "train")
    (damaged,) = (folder / "val/queries").iterdir()
    damaged.write_bytes(b"no picture")
    with pytest.raises(UserError, match="decoded"):
        list(data_of(folder).val_dataloader())
