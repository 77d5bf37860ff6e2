"""Slices: anatomy in its place, lesions of their kinds inside their organs, patients that stay in one set."""

from typing import Any

import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.datamodules.rendered.slices import ANATOMY, HOSTS, KINDS, BodySlices, Ward

NAMES = [*ANATOMY]
CLEAN = Ward(64, 16, 1.0, 0.0)


@pytest.fixture(scope="module")
def cut() -> Any:
    return CLEAN.slices(0, np.arange(480))


def test_organs_are_as_grey_as_they_are_told(cut: Any) -> None:
    image = cut.images[:, 0] / 255
    for name in ("right lung", "liver", "spine", "muscle"):
        inside = (cut.organs == NAMES.index(name) + 1) & ~cut.lesion
        assert np.median(image[inside]) == pytest.approx(ANATOMY[name][0], abs=0.05)
    assert image[cut.organs == 0].mean() < 0.02
    lungs = np.isin(cut.organs, [NAMES.index(n) + 1 for n in ("right lung", "left lung")]).reshape(30, 16, -1)
    liver = (cut.organs == NAMES.index("liver") + 1).reshape(30, 16, -1)
    assert lungs[:, :4].mean() > 10 * lungs[:, -4:].mean()
    assert liver[:, -6:].mean() > 10 * liver[:, :3].mean()


def test_a_lesion_lies_in_its_organ_and_is_of_its_kind(cut: Any) -> None:
    shown = cut.lesion.any(axis=(1, 2))
    assert np.array_equal(shown, cut.label > 0)
    assert set(cut.label) == set(range(len(KINDS)))
    hosts = {NAMES.index(name) + 1 for name in HOSTS}
    assert set(np.unique(cut.organs[cut.lesion])) <= hosts
    image = cut.images[:, 0] / 255
    means = {
        kind: np.concatenate([image[i][cut.lesion[i]] for i in np.flatnonzero(cut.label == kind)]) for kind in (1, 2, 3)
    }
    assert means[1].mean() > 0.75
    assert means[2].mean() < 0.4
    assert means[2].mean() < means[3].mean() < means[1].mean()
    assert means[3].std() > 1.5 * max(means[1].std(), means[2].std())
    area = cut.lesion.sum(axis=(1, 2))
    assert (cut.radius[~shown] == 0).all()
    assert np.corrcoef(area[shown], cut.radius[shown] ** 2)[0, 1] > 0.8
    # All slices of a patient show one kind or none.
    for row in cut.label.reshape(30, 16):
        assert len(set(row) - {0}) <= 1


def test_no_lesion_without_disease() -> None:
    healthy = CLEAN._replace(diseased=0.0).slices(0, np.arange(64))
    assert not healthy.lesion.any()
    assert not healthy.label.any()
    assert (CLEAN._replace(diseased=0.5).slices(0, np.arange(64)).label > 0).any()


def test_no_patient_is_in_two_sets() -> None:
    data = BodySlices(side=8, size=40, val_size=40, test_size=40)
    data.setup()
    patients = [set(part.batch(range(40), [0] * 40)["patient"].tolist()) for part in (data.train, data.val, data.test)]
    assert [len(found) for found in patients] == [3, 3, 3]
    assert len(set.union(*patients)) == 9


def test_a_slice_has_the_same_bits_in_any_batch() -> None:
    ward, numbers = Ward(33, 16, 0.7, 0.05), np.array([3, 2**33, 0, *range(30, 70)])
    together = ward.slices(1, numbers)
    for row in (0, 1, 42):
        alone = ward.slices(1, numbers[[row]])
        assert all(np.array_equal(a[row], b[0]) for a, b in zip(together, alone, strict=True))


def test_a_slice_of_a_pixel_is_a_slice() -> None:
    tiny = Ward(1, 1, 1.0, 0.1).slices(0, np.arange(20))
    assert tiny.images.shape == (20, 1, 1, 1)
    assert np.isfinite(tiny.radius).all()


@pytest.mark.parametrize(
    ("settings", "said"), [({"side": 0}, "side=0"), ({"cuts": 12}, "cuts=12"), ({"diseased": 2.0}, "diseased=2.0")]
)
def test_numbers_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        BodySlices(**settings)
