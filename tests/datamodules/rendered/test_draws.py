"""Numbers of samples are a function of seed, sample and place; neither batches nor orders change them."""

import numpy as np
import torch
from scipy import stats

from lightspan.core.noise import mixed_seed
from lightspan.datamodules.rendered.draws import Draws, _hashed


def everything(draws: Draws) -> list[np.ndarray]:
    return [draws.uniform(3), draws.between(-1, 2, 2, 2), draws.integers(7, 5), draws.normal(3, 5), draws.uniform()]


def test_a_row_does_not_see_its_batch() -> None:
    index = np.array([5, 2**40, 0, 7, 5])
    together = everything(Draws(3, index, 1))
    for row, number in enumerate(index):
        alone = everything(Draws(3, np.array([number]), 1))
        assert all(np.array_equal(a[row], b[0]) for a, b in zip(together, alone, strict=True))


def test_seed_index_and_streams_each_count() -> None:
    index = np.arange(50)
    kinds = [Draws(0, index), Draws(1, index), Draws(0, index, 1), Draws(0, index, 1, 0), Draws(0, index, 0, 1)]
    kinds += [Draws(0, index, np.arange(2, 52)), Draws(0, index + 50)]
    numbers = np.concatenate([draws.uniform(20).ravel() for draws in kinds])
    assert len(set(numbers.tolist())) > len(numbers) - 10  # of 2**24 numbers a few meet


def test_the_hash_is_that_of_the_house() -> None:
    numbers = np.array([0, 1, 2**62, 123_456_789, 2**63 - 1], dtype=np.uint64)
    house = mixed_seed(torch.from_numpy(numbers.astype(np.int64)), 0)  # the hash, and 0
    assert np.array_equal(_hashed(numbers).astype(np.int64), house.numpy())
    assert Draws(0, np.zeros(1)).uniform(4).min() > 0


def test_numbers_have_their_distributions() -> None:
    draws = Draws(0, np.arange(200))
    assert stats.kstest(draws.uniform(100).ravel(), "uniform").pvalue > 0.01
    between = draws.between(2, 5, 100)
    assert between.min() >= 2
    assert between.max() < 5
    counts = np.bincount(draws.integers(7, 100).ravel(), minlength=7)
    assert stats.chisquare(counts).pvalue > 0.01
    normal = draws.normal(3, 50).astype(np.float64)
    assert normal.shape == (200, 3, 50)
    assert stats.kstest(normal.ravel(), "norm").pvalue > 0.01
    assert (
        abs(np.corrcoef(normal.reshape(200, -1)[:, :-1].ravel(), normal.reshape(200, -1)[:, 1:].ravel())[0, 1]) < 0.03
    )
