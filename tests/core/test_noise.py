"""Hashed noise: normal, and a function of its seed alone."""

import numpy as np
import pytest
import torch
from scipy import stats

from lightspan.core.noise import hashed_noise, hashed_uniform, interpolation, mixed_seed


def test_noise_is_normal_and_a_function_of_seed_and_stream_alone() -> None:
    seeds = torch.tensor([0, 1, 2**63 - 1, 123_456_789])
    noise = hashed_noise(seeds, 0, (3, 50, 50))
    assert torch.equal(noise[2:], hashed_noise(seeds[2:], 0, (3, 50, 50)))
    assert not torch.equal(noise, hashed_noise(seeds, 1, (3, 50, 50)))
    assert noise.isfinite().all()
    # At any of these levels one of a hundred sound generators would fail; the numbers are fixed.
    assert all(stats.kstest(row.flatten(), "norm").pvalue > 0.01 for row in noise.double().numpy())
    correlation = torch.corrcoef(torch.cat([noise.flatten(1), noise.flatten(1).roll(1, 1)]))
    assert (correlation - torch.eye(8)).abs().max() < 4 / 7500**0.5


def test_shares_are_even_and_a_function_of_seed_and_stream_alone() -> None:
    seeds = torch.tensor([0, 1, 2**63 - 1])
    shares = hashed_uniform(seeds, 0, (70, 100))
    assert torch.equal(shares[1:], hashed_uniform(seeds[1:], 0, (70, 100)))
    assert not torch.equal(shares, hashed_uniform(seeds, 1, (70, 100)))
    assert shares.min() >= 0
    assert shares.max() < 1
    assert all(stats.kstest(row.flatten(), "uniform").pvalue > 0.01 for row in shares.double().numpy())


def test_each_of_the_numbers_mixed_into_a_seed_counts_and_rows_do_not_see_one_another() -> None:
    number = torch.arange(5)
    seeds = mixed_seed(number, 3, 7)
    assert torch.equal(mixed_seed(number[2:], 3, 7), seeds[2:])
    several = [seeds, mixed_seed(number, 7, 3), mixed_seed(number, 3, 8), mixed_seed(number, 4, 7)]
    assert len(set(torch.cat(several).tolist())) == 20


def test_uniform_numbers_fill_their_interval_and_depend_on_seed_stream_and_place_alone() -> None:
    seeds = torch.arange(4)
    drawn = hashed_uniform(seeds, 0, (100, 100))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = (10 * drawn).long().flatten().bincount(minlength=10)
    assert (counts - 4000).abs().max() < 250
    assert torch.equal(hashed_uniform(seeds[1:2], 0, (5,))[0], drawn[1].flatten()[:5])
    assert not torch.equal(hashed_uniform(seeds, 1, (100, 100)), drawn)


@pytest.mark.parametrize(("side", "points"), [(1, 4), (5, 2), (16, 4), (3, 9), (7, 1)])
def test_interpolation_is_numpys_at_the_middles_of_pixels_between_the_outer_edges(side: int, points: int) -> None:
    values = np.random.default_rng(0).normal(size=points)
    middles = (np.arange(side) + 0.5) / side
    expected = np.interp(middles, np.linspace(0, 1, points), values) if points > 1 else np.full(side, values[0])
    np.testing.assert_allclose(interpolation(side, points) @ values, expected, atol=1e-12)
