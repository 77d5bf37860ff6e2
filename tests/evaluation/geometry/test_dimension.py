import math

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.dimension import (
    fitted_dimension,
    gride,
    likeliest_dimension,
    neighbour_distances,
    neighbour_ratios,
    two_nn_fit,
)
from lightspan.evaluation.geometry.spectra import participation_ratio, singular_values


def likeliest(points_ND):
    return likeliest_dimension(neighbour_ratios(points_ND))


ESTIMATORS = [likeliest, two_nn_fit]


def drawn(count, width, seed=0):
    return torch.rand(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width, seed=1):
    normal = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(normal).Q


def test_four_points_by_hand():
    # Distances on a line at 0, 1, 3, 7: (1, 3), (1, 2), (2, 3), (4, 6).
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    mu = [1.5, 1.5, 2.0, 3.0]
    assert neighbour_ratios(points).sort().values.tolist() == mu
    assert likeliest(points).item() == pytest.approx(3 / sum(map(math.log, mu)))
    x, y = [math.log(m) for m in mu[:3]], [-math.log(1 - i / 4) for i in (1, 2, 3)]
    slope = sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)
    assert two_nn_fit(points, discard=0.25).item() == pytest.approx(slope)
    assert two_nn_fit(points, discard=0.0).item() == pytest.approx(slope)  # the last point never counts


@pytest.mark.parametrize("estimator", [likeliest_dimension, fitted_dimension])
def test_the_estimators_recover_the_dimension_of_their_own_law(estimator):
    # P(mu <= t) = 1 - t^-d, so mu = u^(-1/d): the law itself, free of edges and density.
    mu = (1 - drawn(20_000, 1)[:, 0]).pow(-1 / 7)
    assert estimator(mu).item() == pytest.approx(7, rel=4 / math.sqrt(20_000))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("dimension", "error"), [(1, 0.1), (2, 0.1), (5, 0.12)])
def test_a_curved_manifold_in_many_coordinates_has_its_own_dimension(estimator, dimension, error):
    angles = 2 * math.pi * drawn(1500, dimension)  # a flat torus: no edges
    curved = torch.cat((angles.sin(), angles.cos(), torch.zeros(1500, 7)), dim=1) @ rotation(2 * dimension + 7)
    assert estimator(curved).item() == pytest.approx(dimension, rel=error)
    assert participation_ratio(singular_values(curved, center=True)).item() == pytest.approx(2 * dimension, rel=0.05)


def test_a_gaussian_of_known_rank_has_that_many_linear_dimensions():
    normal = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = normal @ rotation(30)[:4] + 5.0
    assert participation_ratio(singular_values(spread, center=True)).item() == pytest.approx(4, rel=0.01)
    assert likeliest(spread[:1500]).item() == pytest.approx(4, rel=0.12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rotation_scale_shift_and_order_change_nothing(estimator):
    points = drawn(200, 3)
    moved = 1e-3 * (points.flip(0) @ rotation(3)) + 10.0
    assert estimator(moved).item() == pytest.approx(estimator(points).item(), rel=1e-8)
    wider = torch.cat((points, torch.full((200, 4), 2.0)), dim=1)
    assert estimator(wider).item() == pytest.approx(estimator(points).item(), rel=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_repeated_points_count_once(estimator):
    points = drawn(100, 3)
    assert estimator(torch.cat((points, points[:40]))).item() == estimator(points).item()


def test_the_chunk_changes_nothing_and_half_precision_is_widened():
    points = drawn(100, 3)
    assert torch.equal(neighbour_ratios(points, chunk=7), neighbour_ratios(points))
    assert neighbour_ratios(points.half()).dtype == torch.float64


@pytest.mark.parametrize("scale", [1e-300, 1e200, 1e305])
def test_ratios_do_not_depend_on_scale_even_where_squares_overflow(scale):
    points = drawn(50, 2).double()
    assert torch.allclose(neighbour_ratios(points * scale).sort().values, neighbour_ratios(points).sort().values)


def test_points_that_float64_cannot_tell_apart_are_told():
    with pytest.raises(UserError, match="distance is zero in float64"):
        neighbour_ratios(torch.tensor([[0.0], [1e-200], [2e-200], [1.0]], dtype=torch.float64))


def test_close_neighbours_far_from_the_origin_keep_their_digits():
    points = drawn(50, 2)
    assert torch.allclose(neighbour_ratios(points + 1e6).sort().values, neighbour_ratios(points).sort().values, 1e-6)


def test_outliers_move_the_likelihood_more_than_the_fit():
    angles = 2 * math.pi * drawn(1000, 1)
    circle = torch.cat((angles.cos(), angles.sin()), dim=1)
    paired = torch.cat((circle, circle[:10] + 1e-9))  # 2% of the ratios are near a million
    assert likeliest(paired).item() < 0.85
    assert two_nn_fit(paired).item() == pytest.approx(two_nn_fit(circle).item(), rel=0.1)


def test_a_lattice_has_no_finite_dimension():
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert likeliest(square).item() == two_nn_fit(square).item() == math.inf


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bad_points_are_told(estimator):
    with pytest.raises(UserError, match="got 2 different points of 5, but needs 3"):
        estimator(torch.tensor([[0.0], [0.0], [1.0], [1.0], [1.0]]))
    with pytest.raises(UserError, match="NaN or infinite"):
        estimator(torch.tensor([[0.0], [1.0], [torch.nan]]))


@pytest.mark.parametrize("discard", [-0.1, 1.0])
def test_a_share_to_discard_out_of_range_is_told(discard):
    with pytest.raises(UserError, match="at least 0 and below 1"):
        two_nn_fit(drawn(10, 2), discard=discard)


def test_the_nearest_ratio_of_gride_is_that_of_two_nn():
    mu = neighbour_ratios(drawn(200, 4))
    dimension, error = gride(mu, 1)
    assert dimension == pytest.approx(float(likeliest_dimension(mu)), rel=1e-9)
    assert error == pytest.approx(dimension / math.sqrt(200), rel=1e-9)


@pytest.mark.parametrize("nearer", [2, 8])
def test_gride_makes_its_likelihood_largest_and_its_error_is_the_curvature(nearer):
    points = drawn(400, 3).double()
    near, far = neighbour_distances(points, (nearer, 2 * nearer)).unbind(1)
    mu = far / near

    def likelihood(d):  # the logarithm of equation 7's density, with N - 1 in place of N
        return float(
            (len(mu) - 1) * math.log(d)
            + ((nearer - 1) * torch.log(mu**d - 1) - ((2 * nearer - 1) * d + 1) * mu.log()).sum()
        )

    dimension, error = gride(mu, nearer)
    step = 1e-3
    below, at, above = (likelihood(dimension + shift) for shift in (-step, 0, step))
    assert max(below, above) < at
    assert abs(above - below) < 1e-3 * abs(above + below - 2 * at)
    assert error == pytest.approx((-(above + below - 2 * at) / step**2) ** -0.5, rel=5e-3)
    assert dimension == pytest.approx(3, abs=0.5)


def test_neighbours_of_equal_distance_have_no_finite_gride():
    assert gride(torch.ones(5, dtype=torch.float64), 2) == (math.inf, math.inf)
    half = gride(torch.tensor([1.0, 1.0, 2.0, 3.0], dtype=torch.float64), 2)  # some that are equal are ordinary
    assert all(map(math.isfinite, half))


def test_too_few_points_for_a_neighbour_are_told():
    with pytest.raises(UserError, match="Mine got 4 different points of 5, but needs 5: each must have 4 neighbours"):
        neighbour_distances(torch.tensor([[0.0], [1.0], [1.0], [2.0], [4.0]]), (1, 4), who="Mine")
    found = neighbour_distances(torch.tensor([[0.0], [1.0], [3.0]]), (1, 2))
    assert found.tolist() == [[1, 3], [1, 2], [2, 3]]
