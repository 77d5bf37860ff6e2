"""Wrong labels on purpose: their share, what they depend on, and what stays right."""

import numpy as np
import pytest

from lightspan.backbones.tokenizers import HashedWords
from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.image.variants.noisy_labels import NoisyLabels
from lightspan.datamodules.image_text.scenes import Scenes
from lightspan.datamodules.image_text.swapped_captions import SwappedCaptions
from lightspan.datamodules.label_noise import flipped, swapped

COUNT = 20_000
RATES = (0.05, 0.1, 0.3, 0.9)


def within(rate: float, share: float) -> bool:
    """Four standard deviations of a binomial."""
    return abs(share - rate) < 4 * (rate * (1 - rate) / COUNT) ** 0.5


@pytest.mark.parametrize("rate", RATES)
def test_the_share_of_wrong_labels_is_the_rate_and_other_classes_are_alike(rate: float) -> None:
    labels = np.arange(COUNT) % 7
    found = flipped(labels, 7, rate, seed=3)
    assert within(rate, (found != labels).mean())
    assert found.min() == 0
    assert found.max() == 6
    steps = np.bincount((found - labels)[found != labels] % 7, minlength=7)
    assert steps[0] == 0
    expected = COUNT * rate / 6
    assert (np.abs(steps[1:] - expected) < 5 * expected**0.5).all()


def test_wrong_labels_hang_on_seed_and_number_and_those_of_a_lower_rate_stay() -> None:
    labels = np.arange(COUNT) % 7
    low, high = (flipped(labels, 7, rate, seed=3) for rate in (0.1, 0.3))
    assert (high[low != labels] == low[low != labels]).all()
    np.testing.assert_array_equal(flipped(labels[:100], 7, 0.3, seed=3), high[:100])
    np.testing.assert_array_equal(flipped(labels, 7, 0.3, seed=3), high)
    assert (flipped(labels, 7, 0.3, seed=4) != high).any()


@pytest.mark.parametrize("rate", RATES)
def test_captions_change_places_among_those_that_leave_their_own(rate: float) -> None:
    found = swapped(COUNT, rate, seed=3)
    np.testing.assert_array_equal(np.sort(found), np.arange(COUNT))
    gone = found != np.arange(COUNT)
    assert within(rate, gone.mean())
    labels = flipped(np.zeros(COUNT, dtype=np.int64), 7, rate, seed=3)
    np.testing.assert_array_equal(gone, labels != 0)  # the same samples as those whose labels flip


def test_no_rate_changes_nothing_a_full_one_all_and_a_single_class_none() -> None:
    labels = np.arange(50) % 2
    np.testing.assert_array_equal(flipped(labels, 2, 0.0, seed=0), labels)
    np.testing.assert_array_equal(flipped(labels, 2, 1.0, seed=0), 1 - labels)
    np.testing.assert_array_equal(flipped(np.zeros(9, dtype=np.int64), 1, 1.0, seed=0), np.zeros(9))
    assert (swapped(50, 1.0, seed=0) != np.arange(50)).all()
    assert swapped(1, 1.0, seed=0).tolist() == [0]
    assert swapped(0, 1.0, seed=0).tolist() == []


def test_training_labels_are_noisy_and_test_labels_right() -> None:
    data, plain = NoisyLabels(Digits(), rate=0.3, noise_seed=1), Digits()
    for each in (data, plain):
        each.setup()
    wrong = (data.train.data.labels != plain.train.data.labels).mean()
    assert 0.25 < wrong < 0.35
    np.testing.assert_array_equal(data.train.data.images, plain.train.data.images)
    np.testing.assert_array_equal(data.val.data.labels, plain.val.data.labels)
    with pytest.raises(UserError, match=r"NoisyLabels rate=1.5 must lie in \[0, 1\]"):
        NoisyLabels(Digits(), rate=1.5)


def test_training_captions_are_swapped_and_classes_stay() -> None:
    source = Scenes(tokenizer=HashedWords(), length=20, train_size=144, val_size=72)
    (clean, clean_test), (noisy, test) = source.load(), SwappedCaptions(source, rate=0.5).load()
    assert sorted(noisy.captions) == sorted(clean.captions)
    assert noisy.captions != clean.captions
    np.testing.assert_array_equal(noisy.labels, clean.labels)
    assert test.captions == clean_test.captions
    with pytest.raises(UserError, match=r"SwappedCaptions rate=-0.1 must lie in \[0, 1\]"):
        SwappedCaptions(source, rate=-0.1)
