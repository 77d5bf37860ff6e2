import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.shapes import NAMES, Shapes, draw


def test_pictures_are_a_function_of_the_seed_and_the_two_parts_share_none() -> None:
    one, again, other = (Shapes(size=80, draw_seed=seed).load() for seed in (0, 0, 1))
    for (train, test), same in ((one, True), (other, False)):
        assert np.array_equal(train.images, again[0].images) == same
        assert np.array_equal(test.images, again[1].images) == same
    assert not {bytes(image) for image in one[0].images} & {bytes(image) for image in one[1].images}


def test_every_class_comes_as_often() -> None:
    train, test = Shapes(size=400).load()
    assert np.bincount(train.labels).tolist() == [40] * 10
    assert np.bincount(test.labels).tolist() == [10] * 10
    assert train.images.shape == (400, 28, 28)
    assert train.images.dtype == np.uint8


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_lies_inside_the_picture_and_stands_out_from_its_ground(name: str) -> None:
    images = draw(np.full(50, NAMES.index(name)), 0.0, np.random.default_rng(0)).astype(float)
    for image in images:
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == image.min()).mean() > 0.8
        assert image.max() - image.min() > 50
        assert 0.02 < (image > (image.max() + image.min()) / 2).mean() < 0.45


def test_shapes_differ_in_how_much_of_their_circle_they_cover() -> None:
    covered = {}
    for label, name in enumerate(NAMES):
        images = draw(np.full(200, label), 0.0, np.random.default_rng(1)).astype(float)
        low, high = images.min(axis=(1, 2), keepdims=True), images.max(axis=(1, 2), keepdims=True)
        covered[name] = ((images - low) / (high - low)).sum(axis=(1, 2)).mean()
    assert covered["disc"] == pytest.approx(np.pi * 0.9**2 * 58.3, rel=0.1)  # 58.3: mean of the squared radius
    assert covered["square"] == pytest.approx(1.5**2 * 58.3, rel=0.1)
    assert covered["bar"] == pytest.approx(2 * 0.6 * 58.3, rel=0.1)
    assert covered["frame"] < covered["square"]


def test_without_variety_a_shape_differs_in_brightness_alone() -> None:
    for label in range(len(NAMES)):
        images = draw(np.full(20, label), 0.0, np.random.default_rng(0), variety=0.0).astype(float)
        low, high = images.min(axis=(1, 2), keepdims=True), images.max(axis=(1, 2), keepdims=True)
        outlines = (images - low) / (high - low)
        assert np.abs(outlines - outlines[0]).max() < 0.02  # pixels are whole numbers out of 255


def test_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="size=39 must be at least 40"):
        Shapes(size=39)
    with pytest.raises(UserError, match=r"noise=-1\.0"):
        Shapes(noise=-1.0)
    with pytest.raises(UserError, match=r"variety=1\.5"):
        Shapes(variety=1.5)
