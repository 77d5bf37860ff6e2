"""Drawn slices of a chest: functions of their seed, with classes that differ in a nodule alone."""

import numpy as np
import pytest

from lightspan.datamodules.images.ct_slices import CLASSES, CTSlices, draw
from lightspan.errors import UserError


def test_slices_are_a_function_of_their_seed_and_of_their_stream() -> None:
    (first, test), (again, _), (other, _) = (CTSlices(size=16, side=32, draw_seed=seed).load() for seed in (0, 0, 1))
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.images, other.images)
    assert not np.array_equal(first.images[:4], test.images)
    assert first.images.shape == (16, 1, 32, 32)
    assert first.images.dtype == np.uint8
    assert test.images.shape == (4, 1, 32, 32)


def test_lungs_are_darker_than_the_body_and_the_air_around_is_black() -> None:
    images = draw(64, 64, 0.0, np.random.default_rng(0)).images[:, 0] / 255
    air, lung, body = images[:, :4, :4], images[:, 28:34, 16:22], images[:, 40:44, 30:34]
    assert air.max() < 0.05
    assert air.mean() < lung.mean() < body.mean() - 0.2


class Chosen(np.random.Generator):
    """Draws as the generator of seed 0, and labels as told."""

    def __init__(self, label: int) -> None:
        super().__init__(np.random.PCG64(0))
        self.label = label

    def integers(self, low: int, high: int, size: int) -> np.ndarray:  # type: ignore[override]
        return np.full(size, self.label)


def test_classes_come_evenly() -> None:
    labels = draw(300, 16, 0.0, np.random.default_rng(0)).labels
    assert [int((labels == label).sum()) for label in range(len(CLASSES))] == pytest.approx([100] * 3, abs=20)


def test_classes_differ_in_a_bright_nodule_of_a_few_pixels_that_has_a_hole_in_a_ring() -> None:
    none, solid, ring = (draw(20, 64, 0.0, Chosen(label)).images[:, 0] / 255 for label in range(3))
    nodule, hole = solid - none, solid - ring
    assert (nodule.max(axis=(1, 2)) > 0.2).all()
    assert nodule.min() >= 0
    assert ((nodule > 0.05).mean(axis=(1, 2)) < 0.03).all()
    assert (hole.max(axis=(1, 2)) > 0.15).all()
    assert ((hole > 0.05).sum(axis=(1, 2)) < (nodule > 0.05).sum(axis=(1, 2))).all()


def test_what_cannot_be_drawn_is_refused() -> None:
    for wrong in ({"size": 3}, {"side": 8}, {"noise": -1.0}, {"draw_seed": -1}):
        with pytest.raises(UserError, match="CTSlices: size="):
            CTSlices(**wrong)
