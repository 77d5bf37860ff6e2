"""What stands out of noise: the law, its edge, and planted directions."""

import math

import pytest
import torch
from scipy.integrate import quad

from lightspan.evaluation.weights.noise_spectra import (
    CHANCE,
    fit_noise,
    largest_of_noise,
    marchenko_pastur,
    marchenko_pastur_edges,
    marchenko_pastur_quantiles,
    tracy_widom_quantile,
    values_of_noise,
)


def drawn(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("aspect", [1.0, 0.5, 0.01])
def test_the_law_is_the_integral_of_its_density(aspect: float) -> None:
    low, high = marchenko_pastur_edges(aspect)
    places = torch.linspace(low + 0.1 * (high - low), high, 5, dtype=torch.float64)
    found = marchenko_pastur(aspect, places)

    def density(x: float) -> float:
        return math.sqrt(max(0.0, (high - x) * (x - low))) / (2 * math.pi * aspect * x)

    expected = [1 - quad(density, float(place), high)[0] for place in places]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert marchenko_pastur(aspect, torch.tensor([low - 1, high + 1])).tolist() == [0, 1]
    assert marchenko_pastur_quantiles(aspect, found).tolist() == pytest.approx(places.tolist(), rel=1e-6)


def test_edges_and_median_are_the_published_ones() -> None:
    assert marchenko_pastur_edges(0.25) == (0.25, 2.25)
    # Gavish and Donoho: for a square matrix 4 / sqrt 3 over the root of the median is 2.858.
    median = float(marchenko_pastur_quantiles(1.0, torch.tensor([0.5])))
    assert 4 / math.sqrt(3) / math.sqrt(median) == pytest.approx(2.858, abs=5e-4)


@pytest.mark.parametrize(("share", "published"), [(0.5, -1.2686), (0.95, 0.9793), (0.99, 2.0234)])
def test_quantiles_of_tracy_and_widom(share: float, published: float) -> None:
    assert tracy_widom_quantile(share) == pytest.approx(published, abs=0.03)


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (40, 120), (120, 40)])
def test_noise_exceeds_its_edge_as_often_as_it_should(rows: int, columns: int) -> None:
    tops = torch.stack([torch.linalg.svdvals(drawn(rows, columns, seed))[0] for seed in range(400)])
    assert float((tops > largest_of_noise(rows, columns, 0.05)).double().mean()) == pytest.approx(0.05, abs=0.03)


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (40, 120), (120, 40)])
def test_noise_has_nothing_above_itself_and_follows_its_law(rows: int, columns: int) -> None:
    fits = [fit_noise(0.3 * torch.linalg.svdvals(drawn(rows, columns, seed)), rows, columns) for seed in range(100)]
    found = [fit for fit in fits if fit is not None]
    assert len(found) == 100
    assert sum(fit.above > 0 for fit in found) <= 6  # 1 in 100 by CHANCE, 4 % measured at 16 x 16
    assert sum(fit.noise for fit in found) / 100 == pytest.approx(0.3, rel=0.01)
    assert sum(fit.misfit for fit in found) / 100 < 2.5 / min(rows, columns)
    assert CHANCE == 0.01


@pytest.mark.parametrize("planted", [1, 5, 20])
def test_planted_directions_are_counted(planted: int) -> None:
    u, v = (torch.linalg.qr(drawn(side, planted, 1)).Q for side in (120, 200))
    values = torch.linalg.svdvals(0.1 * drawn(120, 200, 2) + 5 * u @ v.T)
    fit = fit_noise(values, 120, 200)
    assert fit is not None
    assert fit.above == planted
    assert fit.noise == pytest.approx(0.1, rel=0.02)
    assert values[planted] < fit.edge < values[planted - 1]


def test_a_direction_below_the_transition_cannot_be_told_from_noise() -> None:
    u, v = (torch.linalg.qr(drawn(side, 1, 1)).Q for side in (100, 100))
    weak, strong = (torch.linalg.svdvals(drawn(100, 100, 3) + size * u @ v.T) for size in (5.0, 30.0))
    assert [fit.above for values in (weak, strong) if (fit := fit_noise(values, 100, 100))] == [0, 1]


def test_a_matrix_of_low_rank_stands_out_whole() -> None:
    values = torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.zeros(29)])
    fit = fit_noise(values, 32, 64)
    assert fit is not None
    assert (fit.above, fit.noise, fit.misfit) == (3, 0, 0)
    zeros = fit_noise(torch.zeros(32), 32, 64)
    assert zeros is not None
    assert zeros.above == 0


def test_there_is_no_noise_to_fit_in_few_values_or_in_a_steep_spectrum() -> None:
    assert fit_noise(torch.ones(15), 15, 100) is None
    assert fit_noise(torch.logspace(0, -5, 64), 64, 64) is None


def test_the_values_of_noise_are_those_that_noise_has() -> None:
    values = torch.linalg.svdvals(drawn(150, 300, 5))
    fit = fit_noise(values, 150, 300)
    assert fit is not None
    expected = values_of_noise(fit, 150, 300, torch.arange(150))
    assert (values - expected).abs().max() < 0.02 * values[0]
