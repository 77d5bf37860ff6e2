"""Overlap and surface distances against plain counting, and windows that join to a whole."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from lightspan.core.errors import UserError
from lightspan.evaluation.dense.segmentation_scores import segmentation_scores, surface_distances
from lightspan.evaluation.dense.sliding_window import gaussian_window, sliding_window, window_starts


def surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    points = [*zip(*np.nonzero(mask), strict=True)]
    inside = set(points)
    steps = [*np.eye(mask.ndim, dtype=int), *-np.eye(mask.ndim, dtype=int)]
    return [point for point in points if any(tuple(np.add(point, step)) not in inside for step in steps)]


def test_distances_are_those_of_all_pairs() -> None:
    generator = np.random.default_rng(0)
    for shape, spacing in (((5, 6, 4), (3.0, 1, 0.5)), ((7, 6), (1.0, 2)), ((9,), (0.1,))):
        a, b = generator.random((2, *shape)) < 0.6
        ends = [np.array(surface(mask)) * spacing for mask in (a, b)]
        pairs = np.linalg.norm(ends[0][:, None] - ends[1][None], axis=-1)
        wanted = np.concatenate([pairs.min(axis=1), pairs.min(axis=0)])
        assert np.allclose(np.sort(surface_distances(a, b, spacing)), np.sort(wanted))


def test_scores_of_a_moved_cube_by_hand() -> None:
    truth = torch.zeros(8, 8, 8, dtype=torch.long)
    truth[2:5, 2:5, 2:5] = 1
    truth[0] = -1
    guess = torch.zeros_like(truth)
    guess[3:6, 2:5, 2:5] = 1
    guess[0] = 2  # where nothing is known
    scores = segmentation_scores(guess, truth, 4, (2.0, 1, 1))
    assert scores.dice[1] == pytest.approx(2 * 18 / 54)
    # The eight side voxels of two slices each are in both; the end caps are a slice, 2 mm, or the middle of one, apart.
    assert 0 < scores.surface_mm[1] <= 2
    assert scores.hausdorff95_mm[1] == 2
    assert np.isnan([scores.dice[2], scores.surface_mm[2], scores.hausdorff95_mm[3]]).all()
    same = segmentation_scores(truth.clamp_min(0), truth, 2)
    assert same.dice.tolist() == [1, 1]
    nothing = segmentation_scores(torch.zeros_like(truth), truth, 2)
    assert nothing.dice[1] == 0
    assert nothing.surface_mm[1] == math.inf
    with pytest.raises(UserError, match="spacing"):
        segmentation_scores(guess, truth, 2, (1.0, 1))


def test_windows_of_a_pointwise_network_give_what_the_whole_gives() -> None:
    torch.manual_seed(0)
    for axes, layer in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), start=1):
        network, x = layer(2, 3, 1), torch.randn(2, 2, *(7, 5, 9)[:axes])
        for overlap in (0.0, 0.5, 0.9):
            for window in ((4, 5, 4)[:axes], (8, 2, 16)[:axes]):
                whole = sliding_window(network, x, window, overlap, batch=3)
                torch.testing.assert_close(whole, network(x).detach(), atol=1e-5, rtol=1e-5)


def test_windows_cover_everything_and_weigh_most_in_the_middle() -> None:
    for side in range(1, 12):
        for window in range(1, 6):
            starts = window_starts(side, window, 0.5)
            assert (starts[0], starts[-1]) == (0, max(side - window, 0))
            assert all(0 <= b - a <= max(1, window // 2) for a, b in pairwise(starts))
    weights = gaussian_window((5, 3))
    assert weights.argmax() == 7
    assert torch.equal(weights, weights.flip(0, 1))
    assert weights.min() > 0
    x = torch.zeros(1, 1, 4, 4)
    for settings, said in (
        ({"window": (2,)}, "window="),
        ({"window": (2, 0)}, "window="),
        ({"window": (2, 2), "overlap": 1.0}, "overlap=1.0"),
        ({"window": (2, 2), "batch": 0}, "batch=0"),
    ):
        with pytest.raises(UserError, match=said):
            sliding_window(lambda part: part, x, **settings)
    with pytest.raises(UserError, match="maps of"):
        sliding_window(lambda part: part[..., :1], x, (2, 2))
