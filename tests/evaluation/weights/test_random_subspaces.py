"""Noise floors of overlaps and angles, against draws of random subspaces."""

import math

import pytest
import torch

from lightspan.evaluation.weights.random_subspaces import angle_floor, cosine_ceiling, mean_overlap, overlap_floor


def cosines(width: int, one: int, other: int, draws: int = 800) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    frames = (torch.randn(draws, width, rank, generator=generator, dtype=torch.float64) for rank in (one, other))
    first, second = (torch.linalg.qr(frame).Q for frame in frames)
    return torch.linalg.svdvals(first.mT @ second)


@pytest.mark.parametrize(("width", "one", "other"), [(64, 8, 8), (64, 4, 20), (200, 3, 3), (40, 1, 5), (20, 1, 1)])
def test_floors_are_what_random_subspaces_show(width: int, one: int, other: int) -> None:
    drawn = cosines(width, one, other)
    overlap = drawn.square().mean(dim=1)
    assert float(overlap.mean()) == pytest.approx(mean_overlap(width, one, other), rel=0.05)
    assert float(overlap.quantile(0.95)) == pytest.approx(overlap_floor(width, one, other), rel=0.1)
    least = drawn[:, 0].acos()
    assert float(least.quantile(0.05)) == pytest.approx(angle_floor(width, one, other), abs=0.03)


def test_one_direction_has_the_beta_law() -> None:
    # In the plane the angle is uniform in [0, 90] degrees; in space its cosine is uniform.
    assert overlap_floor(2, 1, 1) == pytest.approx(math.cos(math.radians(4.5)) ** 2)
    assert angle_floor(3, 1, 1) == pytest.approx(math.acos(0.95))


def test_subspaces_that_must_meet_have_no_smallest_angle() -> None:
    assert angle_floor(10, 5, 6) == 0
    assert angle_floor(10, 5, 5) == 0
    assert overlap_floor(4, 4, 2) == mean_overlap(4, 4, 2) == 1
    assert mean_overlap(1, 1, 1) == overlap_floor(1, 1, 1) == 1


@pytest.mark.parametrize(("width", "directions"), [(50, 50), (100, 10), (3, 1)])
def test_the_ceiling_of_cosines_is_what_random_directions_show(width: int, directions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(4000, width, generator=generator, dtype=torch.float64), dim=1)
    largest = x[:, :directions].abs().amax(dim=1)  # any orthonormal directions are as good as these
    assert float(largest.quantile(0.95)) == pytest.approx(cosine_ceiling(width, directions), rel=0.05)
    assert cosine_ceiling(1, 1) == 1
    assert cosine_ceiling(5, 0) == 0
