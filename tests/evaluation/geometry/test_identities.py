"""People in noisy tracklets: each stage on directions in a plane, where angles say what is near."""

import math

import pytest
import torch
from torch import Tensor

from lightspan.evaluation.geometry.identities import (
    centres,
    closeness_to_own,
    linked,
    moved_to_nearest,
    noise,
    numbered,
    pairwise_scores,
    without_far_pictures,
)


def at(*degrees: float) -> Tensor:
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def groups(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def cosine(degrees: float) -> float:
    return math.cos(math.radians(degrees))


def test_centres_are_of_unit_length_and_know_nothing_of_who_is_left_out() -> None:
    found = centres(at(0, 60, 100, 123), groups(0, 0, 1, -1))
    torch.testing.assert_close(found, at(30, 100))
    expected = torch.tensor([cosine(30), cosine(30), 1, 1], dtype=torch.float64)
    torch.testing.assert_close(closeness_to_own(at(0, 60, 100, 123), groups(0, 0, 1, -1)), expected)
    assert torch.equal(numbered(groups(7, -1, 3, 7)), groups(1, -1, 0, 1))


def test_the_farthest_picture_goes_first_and_the_centre_is_found_again() -> None:
    """At first 0 and 10 degrees are farther from the centre (31 degrees) than 20; without 100 all three are near it."""
    x, least = at(0, 10, 20, 100), cosine(15)
    assert torch.equal(without_far_pictures(x, groups(0, 0, 0, 0), least), groups(0, 0, 0, -1))
    assert torch.equal(without_far_pictures(x, groups(0, 0, 0, 1), least), groups(0, 0, 0, 1))
    spread = without_far_pictures(at(0, 120, 240), groups(4, 4, 4), 0.99)
    assert (spread >= 0).sum() == 1  # one always stays
    assert torch.equal(without_far_pictures(x, groups(-1, -1, -1, -1), least), groups(-1, -1, -1, -1))


def test_links_are_transitive_within_reach_and_stay_in_a_video() -> None:
    x = at(0, 20, 40, 180, 42)
    assert torch.equal(linked(x, cosine(25), reach=4), groups(0, 0, 0, 1, 0))  # 0 and 40 by 20
    assert torch.equal(linked(x, cosine(25), reach=1), groups(0, 0, 0, 1, 2))  # 42 is two behind 40
    videos = groups(0, 0, 1, 1, 1)
    assert torch.equal(linked(x, cosine(25), 4, videos), groups(0, 0, 1, 2, 1))
    assert torch.equal(linked(x, cosine(25), reach=0), torch.arange(5))
    assert linked(x[:0], 0.5, 3).shape == (0,)


def test_pictures_move_to_the_nearest_centre_of_their_video_alone() -> None:
    x, video = at(0, 2, 90, 92, 88, 1), groups(0, 0, 0, 0, 0, 1)
    found = moved_to_nearest(x, groups(0, 0, 1, 1, 0, 2), video)
    assert torch.equal(found, groups(0, 0, 1, 1, 1, 2))
    assert torch.equal(moved_to_nearest(x, groups(0, -1, 1, 1, 0, 2), video)[1:2], groups(-1))


def test_noise_is_spread_over_the_distance_to_the_nearest_other() -> None:
    found = noise(at(-10, 10, 90), groups(0, 0, 1))
    torch.testing.assert_close(found, torch.tensor([1 - cosine(10), 0.0], dtype=torch.float64))
    assert noise(at(0, 40), groups(0, 0)).tolist() == [0.0]  # nobody else
    assert noise(at(-10, 10, 0), groups(0, 0, 1))[0] == torch.inf
    assert noise(at(5), groups(-1)).shape == (0,)


def test_pairwise_scores_by_hand() -> None:
    """Claimed are 01, 02, 12 and 34, of which 01 and 34 are right; there are 01, 25, 34."""
    scores = pairwise_scores(groups(0, 0, 0, 1, 1, -1), groups(5, 5, 6, 7, 7, 6))
    assert scores == pytest.approx((2 / 4, 2 / 3, 4 / 7))
    assert pairwise_scores(groups(-1, -1), groups(0, 0)) == (1.0, 0.0, 0.0)
    assert pairwise_scores(groups(0, 1), groups(0, 1)) == (1.0, 1.0, 1.0)
