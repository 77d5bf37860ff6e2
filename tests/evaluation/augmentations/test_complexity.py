"""Complexities estimated from samples, against the hypercube, where they are known."""

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.evaluation.augmentations.complexity import (
    AugmentationComplexity,
    Complexities,
    followed,
    sample_complexities,
)
from lightspan.evaluation.augmentations.densities import BlockMask, GaussianNoise, RandomMask
from lightspan.evaluation.augmentations.tables import block_complexity, cube, masked_complexity, masked_cube
from lightspan.evaluation.features.features import Features


def estimate(density, x: torch.Tensor, draws: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return sample_complexities(density, x, torch.arange(2), [len(x)], draws, generator)[0]


def test_estimates_are_the_closed_forms_where_the_samples_are_the_distribution() -> None:
    x = cube(6)
    torch.testing.assert_close(
        estimate(RandomMask(0.5), x), torch.full((2,), masked_complexity(6, 0.5)).double(), atol=0.4, rtol=0
    )
    exact = torch.full((2,), block_complexity(6, 0.5), dtype=torch.float64)
    torch.testing.assert_close(estimate(BlockMask(0.5), x), exact)  # each draw has the same
    torch.testing.assert_close(estimate(RandomMask(1.0), x), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(estimate(RandomMask(0.0), x, 2), torch.full((2,), 64.0, dtype=torch.float64))


def test_noise_runs_from_no_information_to_all_of_it() -> None:
    x = torch.arange(10.0, dtype=torch.float64)[:, None]
    assert estimate(GaussianNoise(1e-3), x, 10).tolist() == pytest.approx([10, 10])
    assert estimate(GaussianNoise(1e4), x, 10).tolist() == pytest.approx([1, 1], abs=1e-3)


def test_the_density_of_noise_is_the_normal_one_up_to_a_constant() -> None:
    a, x = (torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows)).double() for rows in (4, 5))
    normal = torch.distributions.Normal(x, 0.7).log_prob(a[:, None]).sum(dim=2)
    found = GaussianNoise(0.7).log_density(a, x)
    torch.testing.assert_close(found - found[:, :1], normal - normal[:, :1])


def test_a_mask_keeps_what_agrees_and_rules_out_the_rest() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    a = torch.tensor([[0.0, torch.nan], [torch.nan, 1.0]], dtype=torch.float64)
    assert RandomMask(0.5).log_density(a, x).exp().tolist() == [[1, 1], [0, 1]]


def test_what_samples_limit_is_said_and_not_followed_beyond_them() -> None:
    exact = masked_complexity(8, 0.5)
    found = AugmentationComplexity({"weak": RandomMask(0.02), "strong": RandomMask(0.9)}).fit(Features(cube(8)[:64]))
    last = {row["augmentation"]: row for row in found.rows if row["samples"] == 64}
    assert last["weak"]["saturated"]
    assert not last["strong"]["saturated"]
    assert last["weak"]["largest"] <= 64 < exact * 4
    assert "limited" in found.figures()[0].name


def test_following_to_infinitely_many_samples_comes_nearer_to_the_truth() -> None:
    truth, errors = masked_complexity(8, 0.6), []
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        rows = torch.randperm(256, generator=generator)
        given = masked_cube(8, 0.6)
        values = tuple(given.of_samples(rows[:n]).kernel().diagonal()[rows[:n]].mean().item() for n in (20, 40))
        (end,) = followed((20, 40), values[:1], values[1:])
        assert end is not None
        errors.append((abs(end - truth), abs(values[1] - truth)))
    near, plain = (sum(column) for column in zip(*errors, strict=True))
    assert near < 0.6 * plain
    assert followed((30, 60), [30.0], [60.0]) == [None]


def test_what_falls_or_would_end_below_a_smaller_quantile_is_not_followed() -> None:
    # 1 / K of 10 and 15 at N of 50 and 100 is a line that ends at 1 / 30; 40 and 41 end at 42.05.
    assert followed((50, 100), [10, 20], [15, 21]) == [pytest.approx(30), None]  # 22.1 is below 30
    assert followed((50, 100), [10, 40], [15, 41]) == [pytest.approx(30), pytest.approx(1 / (2 / 41 - 1 / 40))]
    assert followed((50, 100), [12, 20, 40], [11, 21, 39]) == [None, pytest.approx(1 / (2 / 21 - 1 / 20)), None]
    assert followed((50, 100), [50, 60], [100, 61]) == [None, None]  # the smaller one has no end that can be told
    almost = 7 * (1 - 1e-15)
    assert followed((50, 100), [7.0, 7.0], [7.0, almost]) == [pytest.approx(7), pytest.approx(7)]


def test_a_falling_estimate_is_said_and_the_table_has_the_floor() -> None:
    rows = tuple(
        {"augmentation": "a", "samples": n, "median": k, "upper": 8.0, "largest": 9.0, "saturated": False}
        for n, k in ((25, 7.0), (50, 6.0), (100, 5.0))
    )
    found = Complexities(rows, ({"augmentation": "a", "median": None, "upper": 8.0, "largest": 9.0},), 3)
    said = [figure.name for figure in found.figures() if "could not be extrapolated" in figure.name]
    assert len(said) == 1
    assert said[0].startswith("median")
    assert [row["floor"] for row in found.table()] == [1, 1, 1]


def test_wrong_settings_and_samples_are_refused() -> None:
    with pytest.raises(UserError, match="augmentations"):
        AugmentationComplexity({})
    for kind, wrong in ((RandomMask, 1.5), (BlockMask, -0.1), (GaussianNoise, 0.0)):
        with pytest.raises(UserError, match="must"):
            kind(wrong)
    with pytest.raises(UserError, match="4 samples"):
        AugmentationComplexity().fit(Features(torch.ones(3, 2)))
