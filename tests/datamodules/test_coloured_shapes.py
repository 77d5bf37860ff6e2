import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.coloured_shapes import CLASSES, COLOURS, ColouredShapes, draw, factors


def test_pictures_are_a_function_of_the_seed_and_the_two_parts_share_none() -> None:
    one, again, other = (ColouredShapes(size=256, draw_seed=seed).load() for seed in (0, 0, 1))
    for part in (0, 1):
        assert np.array_equal(one[part].images, again[part].images)
        assert not np.array_equal(one[part].images, other[part].images)
    assert not {bytes(image) for image in one[0].images} & {bytes(image) for image in one[1].images}
    assert one[0].images.shape == (256, *ColouredShapes.image_shape)
    assert one[0].images.dtype == np.uint8
    assert np.bincount(one[0].labels).tolist() == [4] * CLASSES


def test_each_class_has_factors_of_its_own_and_pairs_share_up_to_two() -> None:
    of_class = factors(np.arange(CLASSES))
    assert {tuple(row) for row in of_class} == {(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    shared = (of_class[:, None] == of_class[None]).sum(axis=2)
    assert np.bincount(shared.ravel()).tolist() == [64 * n for n in (27, 27, 9, 1)]


def test_a_picture_shows_the_factors_of_its_class() -> None:
    labels = np.repeat(np.arange(CLASSES), 20)
    images = draw(labels, 0.0, np.random.default_rng(0)).astype(float)
    shape, colour, texture = factors(labels).T
    ground = np.median(images, axis=(2, 3), keepdims=True)  # which most of a picture is
    painted = np.abs(images - ground).max(axis=1) > 25
    inside = [image[:, at] for image, at in zip(images, painted, strict=True)]
    assert min(pixels.shape[1] for pixels in inside) > 5
    hues = np.stack([pixels.mean(axis=1) for pixels in inside])[texture == 0]
    paints = np.array([*COLOURS.values()])
    alike = (hues / np.linalg.norm(hues, axis=1)[:, None]) @ (paints / np.linalg.norm(paints, axis=1)[:, None]).T
    assert (alike.argmax(axis=1) == colour[texture == 0]).mean() > 0.95
    spread = np.array([pixels.max(axis=0).std() for pixels in inside])
    assert spread[texture == 0].mean() < 0.7 * min(spread[texture == kind].mean() for kind in (1, 2, 3))
    disc, square, triangle, cross = (painted[(texture == 0) & (shape == kind)].mean() for kind in range(4))
    assert disc > square > max(triangle, cross)


def test_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="size=255 must be at least 256"):
        ColouredShapes(size=255)
    with pytest.raises(UserError, match=r"noise=-1\.0"):
        ColouredShapes(noise=-1.0)
