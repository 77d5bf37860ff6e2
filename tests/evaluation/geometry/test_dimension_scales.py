"""Dimensions over scales: planted ones, and the figures of DADApy 0.3.4 on the same points."""

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.dimension_scales import DecimatedTwoNN, Gride

DADAPY = {
    "dimension": [1.1167443125056744, 1.6076433104017342, 1.0720386035311094],
    "error": [0.045590895646568354, 0.047176242457651674, 0.022317716808059395],
    "distance": [0.015789380734264127, 0.02677830364510985, 0.05020876219200151],
}
"""return_id_scaling_gride(range_max=8) on `waves`; its search for the dimension stops at 1e-7."""


def waves() -> torch.Tensor:
    place = torch.arange(600, dtype=torch.float64)
    return torch.stack([torch.sin(1.7 * k * place + k * k) * (1 if k < 3 else 0.05) for k in range(1, 6)], dim=1)


def noisy_plane(count: int, noise: float) -> Features:
    """A square in 6 dimensions with noise in all of them."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.zeros(count, 6, dtype=torch.float64)
    plane[:, :2] = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return Features(plane + noise * torch.randn(count, 6, generator=generator, dtype=torch.float64))


def test_gride_is_that_of_dadapy() -> None:
    scales = Gride(furthest=8).fit(Features(waves())).scales
    for key, expected in DADAPY.items():
        assert [row[key] for row in scales] == pytest.approx(expected, rel=1e-6)
    assert [row["neighbours"] for row in scales] == [2, 4, 8]


def test_all_points_at_once_are_two_nn_of_dadapy() -> None:
    scales = DecimatedTwoNN(fewest=40).fit(Features(waves())).scales
    assert scales[0]["dimension"] == pytest.approx(1.116744295810815)
    assert [(row["points"], row["estimates"]) for row in scales] == [(600, 1), (300, 2), (150, 4), (75, 8)]
    # DADApy's parts are drawn anew and may overlap: 1.281 +- 0.061, 1.211 +- 0.028, 1.231 +- 0.073.
    for row, theirs in zip(scales[1:], (1.281, 1.211, 1.231), strict=True):
        assert row["dimension"] == pytest.approx(theirs, abs=0.1)


@pytest.mark.parametrize("estimator", [Gride(furthest=128), DecimatedTwoNN(fewest=60)])
def test_noise_fills_small_scales_and_the_plane_shows_at_large_ones(estimator) -> None:
    scales = estimator.fit(noisy_plane(1500, 0.004)).scales
    assert [row["distance"] for row in scales] == sorted(row["distance"] for row in scales)
    assert scales[0]["dimension"] > 2.8
    assert scales[-1]["dimension"] == pytest.approx(2, abs=0.3)
    assert all(0 < row["error"] < 0.5 for row in scales)


def test_error_bars_cover_the_planted_dimension() -> None:
    misses = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        square = torch.rand(400, 2, generator=generator, dtype=torch.float64)
        first = Gride(furthest=2).fit(Features(square)).scales[0]
        misses.append(abs(first["dimension"] - 2) > 2.5 * first["error"])
    assert sum(misses) <= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_few_points_and_lattices_are_refused(dtype: torch.dtype) -> None:
    lattice = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).to(dtype)
    for estimator in (Gride(), DecimatedTwoNN()):
        with pytest.raises(UserError, match="got 4 different points, but needs 10"):
            estimator.fit(Features(lattice[:4].repeat(9, 1)))
        with pytest.raises(UserError, match="equally far away, as on a lattice"):
            estimator.fit(Features(lattice))
        with pytest.raises(UserError, match="NaN or infinite"):
            estimator.fit(Features(lattice * torch.nan))


def test_repeated_points_count_once() -> None:
    points = waves()[:100]
    once, twice = (Gride(furthest=16).fit(Features(x)).scales for x in (points, points.repeat(3, 1)))
    assert once == twice
    assert once[0]["points"] == 100
