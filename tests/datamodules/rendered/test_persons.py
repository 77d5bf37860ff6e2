"""Persons: one code each, sets without a common person, labels that are wrong as often as said."""

from typing import Any

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.rendered.persons import CLOTHES, CODES, Crowd, Persons, codes


def crowd(count: int = 50, wrong: float = 0.0, mixed: float = 0.0, side: int = 48) -> Crowd:
    return Crowd(100, count, 4, 8, 2, wrong, mixed, side, max(side // 2, 1))


def test_a_persons_code_is_its_own() -> None:
    assert len(np.unique(codes(np.arange(CODES)), axis=0)) == CODES


def test_sets_share_no_person_and_no_tracklet() -> None:
    data = Persons(2, 3, size=30, val_size=10, test_size=10, batch_size=8)
    data.setup()
    sets = [part.batch(range(len(part)), [0] * len(part)) for part in (data.train, data.val, data.test)]
    for field in ("identity", "tracklet"):
        found = [set(batch[field].tolist()) for batch in sets]
        assert len(set.union(*found)) == sum(map(len, found))
    assert [len(set(batch["identity"].tolist())) for batch in sets] == [30, 10, 10]
    grown = Persons(2, 3, size=60, val_size=10, test_size=10)
    grown.setup()
    assert torch.equal(grown.val.batch([3], [0])["identity"], data.val.batch([3], [0])["identity"])


def test_pictures_of_a_person_wear_its_colours_in_every_camera() -> None:
    people, index = crowd(), np.arange(0, 1600, 7)
    seen = people.sightings(0, index)
    images = people.pictures(0, seen).astype(float)
    assert set(seen.camera) == {0, 1}
    paints = np.array(CLOTHES)
    paints /= np.linalg.norm(paints, axis=1)[:, None]
    stripes = codes(seen.identity)[:, 1:4]
    right = 0
    for image, code in zip(images, stripes, strict=True):
        alike = np.einsum("kc,chw->khw", paints, image / np.linalg.norm(image, axis=0).clip(1))
        found = alike.argmax(axis=0)[10:32, 6:18]  # about the shirt
        right += sum((found == stripe).sum() >= 8 for stripe in code)
    assert right > 0.9 * 3 * len(index)


def test_labels_are_wrong_by_tracklet_and_mixed_by_picture_as_often_as_said() -> None:
    index = np.arange(400 * 32)
    clean = crowd(400).sightings(0, index)
    assert np.array_equal(clean.identity, clean.label + 100)
    wrong = crowd(400, wrong=0.3).sightings(0, index)
    confused = (wrong.identity != wrong.label + 100).reshape(-1, 8)
    assert (confused.all(axis=1) | ~confused.any(axis=1)).all()
    assert confused.mean() == pytest.approx(0.3, abs=0.03)
    mixed = crowd(400, mixed=0.1).sightings(0, index)
    strangers = mixed.identity != mixed.label + 100
    assert strangers.mean() == pytest.approx(0.1, abs=0.01)
    assert (strangers.reshape(-1, 8).mean(axis=1) < 1).all()
    for sightings in (wrong, mixed):
        assert sightings.identity.min() >= 100
        assert sightings.identity.max() < 500


def test_one_person_cannot_be_confused() -> None:
    seen = crowd(1, wrong=1.0, mixed=1.0).sightings(0, np.arange(32))
    assert (seen.identity == 100).all()


def test_pictures_of_a_label_stand_side_by_side() -> None:
    data = Persons(size=20, val_size=1, test_size=1, together=3, wrong=0.5, batch_size=5)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["label"], batch["index"])
    identity, tracklet, camera, frame = batch["parameters"].unbind(2)
    assert torch.equal(tracklet // 4, batch["label"][:, None].expand(5, 3).float())
    assert torch.equal(tracklet % 2, camera)
    assert all(len({*row}) == 3 for row in (tracklet * 8 + frame).tolist())
    single = data.bank.batch([int(tracklet[0, 1] * 8 + frame[0, 1])], [0])
    assert torch.equal(single["image"][0], batch["views"][1][0])
    assert single["identity"][0] == identity[0, 1]


def test_a_picture_has_the_same_bits_in_any_batch() -> None:
    people, index = crowd(wrong=0.3, mixed=0.2), np.array([5, 1599, 0, *range(40, 90)])
    together = people.pictures(2, people.sightings(2, index))
    for row in (0, 1, 52):
        assert np.array_equal(people.pictures(2, people.sightings(2, index[[row]]))[0], together[row])


def test_a_picture_of_a_pixel_is_a_picture() -> None:
    people = crowd(side=1)
    assert people.pictures(0, people.sightings(0, np.arange(40))).shape == (40, 3, 1, 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"frames": 0}, "frames=0"),
        ({"together": 0}, "together=0"),
        ({"wrong": 1.5}, "wrong=1.5"),
        ({"size": 16_300}, "more than the 16384 persons"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Persons(**settings)
