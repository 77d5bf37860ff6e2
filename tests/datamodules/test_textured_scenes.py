"""Textured scenes: objects and pictures agree, draws are functions of their seed, and bad settings are refused."""

import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.textured_scenes import MOST, SIDE, TexturedScenes, draw


def test_objects_are_numbered_and_each_pixel_belongs_to_one() -> None:
    scenes = draw(200, 0.0, np.random.default_rng(0))
    assert scenes.images.shape == (200, 3, SIDE, SIDE)
    assert scenes.images.dtype == np.uint8
    counts = [len(np.unique(objects)) - 1 for objects in scenes.objects]
    assert set(counts) <= {1, 2, 3}
    assert 0.3 < np.mean(np.array(counts) == MOST) < 0.6
    for image, objects in zip(scenes.images[:20], scenes.objects[:20], strict=True):
        for number in np.unique(objects):  # two colours and what lies between: pixels of one thing lie on a line
            pixels = image[:, objects == number].T.astype(float)
            _, spread, _ = np.linalg.svd(pixels - pixels.mean(axis=0), full_matrices=False)
            assert spread[1] <= 1.0 * len(pixels) ** 0.5  # rounding to whole numbers


def test_pictures_are_functions_of_the_seed_and_labels_tell_the_number_of_objects() -> None:
    first, again, other = (TexturedScenes(size=16, draw_seed=seed).load()[0] for seed in (0, 0, 1))
    assert np.array_equal(first.images, again.images)
    assert not np.array_equal(first.images, other.images)
    scenes = draw(16, 0.05, np.random.default_rng((0, 0)))
    assert np.array_equal(first.labels, scenes.objects.max(axis=(1, 2)) == MOST)
    assert len(draw(0, 0.05, np.random.default_rng(0)).images) == 0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="size=3 must be at least 4"):
        TexturedScenes(size=3)
