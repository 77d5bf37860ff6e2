"""Measures of collapse against closed forms, and on degenerate rows in every dtype."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.collapse import (
    alignment,
    dead_dimensions,
    duplicates,
    length,
    lidar,
    prototype_use,
    rankme,
    spread,
    uniformity,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
OF_ROWS = [rankme, uniformity, spread, dead_dimensions, duplicates]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(normal(rows, columns)).Q


def smooth(shares: list[float], epsilon: float = 1e-7) -> float:
    return math.exp(-sum((p + epsilon) * math.log(p + epsilon) for p in shares))


# RankMe.


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_rankme_is_the_planted_rank_of_equal_singular_values(rank: int) -> None:
    planted = orthonormal(40, rank) @ orthonormal(6, rank).T
    assert rankme(planted) == pytest.approx(smooth([1 / rank] * rank + [0.0] * (6 - rank)), rel=1e-9)
    assert rankme(planted) == pytest.approx(rank, abs=1e-4)


def test_rankme_of_values_two_and_one_with_its_epsilon_by_hand() -> None:
    x = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    assert rankme(x, epsilon=0.01) == pytest.approx(smooth([2 / 3, 1 / 3], 0.01), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e3])
def test_rankme_knows_neither_scale_nor_rotation_nor_order(scale: float) -> None:
    x = normal(20, 5)
    assert rankme(scale * x.flip(0) @ orthonormal(5, 5)) == pytest.approx(rankme(x))


# LiDAR.


def lidar_by_scipy(x_NQD: Tensor, delta: float, epsilon: float) -> float:
    """The generalised eigenvalues of Sigma_b v = lambda Sigma_w v, of covariances by numpy."""
    x = x_NQD.numpy()
    means = x.mean(axis=1)
    between = np.cov(means.T, bias=True)
    within = np.mean([np.cov(views.T, bias=True) for views in x], axis=0)
    within += delta * np.trace(within + between) / x.shape[2] * np.eye(x.shape[2])
    values = scipy.linalg.eigh(between, within, eigvals_only=True).clip(0)[-len(x) :]  # others are 0 whatever x
    return smooth(list(values / values.sum()), epsilon)


def test_lidar_is_the_smooth_rank_of_the_generalised_eigenvalues() -> None:
    x = normal(30, 1, 5) * torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5]) + 0.4 * normal(30, 4, 5, seed=1)
    assert lidar(x) == pytest.approx(lidar_by_scipy(x, 1e-4, 1e-7), rel=1e-9)
    assert lidar(x, delta=0.3, epsilon=0.01) == pytest.approx(lidar_by_scipy(x, 0.3, 0.01), rel=1e-9)


@DTYPES
def test_lidar_is_exact_and_knows_no_scale_where_points_span_fewer_dimensions_than_they_have(dtype) -> None:
    """As in a run at too high a rate: 24 points of 60 dimensions, or of a plane, at any length."""
    wide, flat = normal(12, 1, 60) + 0.2 * normal(12, 2, 60, seed=1), normal(12, 2, 2) @ normal(2, 60, seed=1)
    for x in (wide, flat):
        figures = [lidar((scale * x.to(dtype).double()).to(dtype)) for scale in (1.0, 2.0**7, 2.0**-7)]
        assert figures == pytest.approx([lidar_by_scipy(x.to(dtype).double(), 1e-4, 1e-7)] * 3, rel=1e-6)
    if dtype in (torch.float32, torch.float64):
        for scale in (1e7, 1e-7, 1e30, 1e-30):
            assert lidar(scale * wide.to(dtype)) == pytest.approx(lidar(wide), rel=1e-4)


def test_lidar_of_views_that_agree_is_the_smooth_rank_of_the_samples_covariance() -> None:
    x = normal(30, 5)
    energy = torch.linalg.svdvals(x - x.mean(dim=0)).square()
    assert lidar(x[:, None].expand(30, 3, 5)) == pytest.approx(smooth((energy / energy.sum()).tolist()), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_lidar_is_the_number_of_directions_in_which_samples_differ_equally(rank: int) -> None:
    """Means on a planted subspace, views apart by the same covariance in all directions: Sigma_w is a multiple of I."""
    means = orthonormal(40, 40)[:, :rank]
    means = torch.cat([means, -means]) @ orthonormal(5, rank).T
    noise = torch.cat([torch.eye(5), -torch.eye(5)]).double()
    x = means[:, None] + noise
    assert lidar(x) == pytest.approx(smooth([1 / rank] * rank + [0.0] * (5 - rank)), rel=1e-6)


def test_what_varies_between_views_as_well_counts_less_than_for_rankme() -> None:
    """One direction tells samples apart, four are noise of the views, which RankMe takes for dimensions."""
    x = 0.5 * normal(200, 8, 5)
    x[..., 0] = 5 * normal(200, 1, seed=1) + 0.01 * x[..., 0]
    assert lidar(x) < 1.1
    assert rankme(x[:, 0]) > 2.5


def test_grouping_is_what_counts_not_the_rows() -> None:
    x = normal(30, 1, 5) + 0.1 * normal(30, 4, 5, seed=1)
    shuffled = x.flatten(0, 1)[torch.randperm(120, generator=torch.Generator().manual_seed(2))].view_as(x)
    assert lidar(x.flip(0).flip(1)) == pytest.approx(lidar(x), rel=1e-9)
    assert abs(lidar(shuffled) - lidar(x)) > 0.01


# Uniformity, alignment, spread.


def test_uniformity_of_two_opposite_and_two_equal_directions_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
    assert uniformity(x) == pytest.approx(-8)  # squared distance 4, t = 2
    three = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 5.0]])  # pairs at squared distances 0, 2, 2
    assert uniformity(three) == pytest.approx(math.log((1 + 2 * math.exp(-4)) / 3))


def test_alignment_is_the_mean_squared_distance_of_all_pairs_of_views() -> None:
    views = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]])  # 2, 4, 2
    assert alignment(views) == pytest.approx(8 / 3)
    assert alignment(views.expand(4, 3, 2)) == pytest.approx(8 / 3)
    assert alignment(torch.ones(3, 2, 4)) == 0


def test_spread_of_directions_that_fill_the_sphere_evenly_is_one() -> None:
    assert spread(torch.cat([torch.eye(6), -torch.eye(6)])) == pytest.approx(1)
    assert spread(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(math.sqrt(2) / 2)  # one of two dimensions


def test_dimensions_that_never_move_are_dead_whatever_their_value() -> None:
    x = normal(20, 4)
    x[:, 1], x[:, 2] = 0.1, 0.0
    assert dead_dimensions(x) == 0.5
    assert dead_dimensions(x.bfloat16()) == 0.5


def test_duplicates_have_the_direction_of_another_row() -> None:
    x = torch.eye(4)
    assert duplicates(x) == 0
    assert duplicates(torch.cat([x, 3 * x[:1]])) == pytest.approx(2 / 5)
    assert duplicates(torch.cat([x, -x])) == 0


# Prototypes.


def test_prototypes_in_use_and_of_a_sample_by_hand() -> None:
    assert prototype_use(torch.eye(5)) == pytest.approx((5, 1))
    assert prototype_use(torch.eye(5)[[0, 0, 0]]) == pytest.approx((1, 1))  # all go to one
    assert prototype_use(torch.full((3, 5), 0.2)) == pytest.approx((5, 5))  # all go everywhere
    assert prototype_use(torch.tensor([[2.0, 2.0, 0.0], [0.0, 0.0, 7.0]])) == pytest.approx(
        (math.exp(0.5 * math.log(4) + 0.5 * math.log(2)), math.sqrt(2))
    )


def test_a_row_without_any_assignment_is_left_out() -> None:
    assert prototype_use(torch.cat([torch.eye(3), torch.zeros(2, 3)])) == pytest.approx((3, 1))
    assert prototype_use(torch.zeros(4, 3)) == (0, 0)


# Degenerate rows.


@DTYPES
@pytest.mark.parametrize("value", [0.0, 0.1, 1000.0])
def test_equal_rows_are_a_complete_collapse(value: float, dtype: torch.dtype) -> None:
    x = torch.full((20, 5), value, dtype=dtype)
    assert rankme(x) == pytest.approx(float(value > 0), abs=1e-4)
    assert (uniformity(x), spread(x), dead_dimensions(x), duplicates(x)) == (0, 0, 1, 1)
    views = x.unflatten(0, (10, 2))
    assert (lidar(views), alignment(views)) == (0, 0)


@DTYPES
def test_half_precision_gives_the_measures_of_the_same_numbers_in_float32(dtype: torch.dtype) -> None:
    x = normal(20, 2, 6).to(dtype)
    for measure in OF_ROWS:
        assert measure(x[:, 0]) == pytest.approx(measure(x[:, 0].float()), rel=1e-5)
    for measure in (lidar, alignment):
        assert measure(x) == pytest.approx(measure(x.float()), rel=1e-4)


def test_only_length_depends_on_the_scale_of_rows() -> None:
    x = normal(20, 6).float()
    for scale in (1e-38, 1e-30, 1e-7, 1e7, 1e30, 5e37):
        for measure in (uniformity, spread, duplicates, rankme, dead_dimensions):
            assert measure(scale * x) == pytest.approx(measure(x), rel=1e-4)
        views = x.unflatten(0, (10, 2))
        assert alignment(scale * views) == pytest.approx(alignment(views), rel=1e-4)
        assert length(scale * x) == pytest.approx(scale * length(x), rel=1e-4)
    assert length(torch.tensor([[3.0, 4.0], [0.0, 1.0]])) == 3


@DTYPES
def test_numbers_that_are_not_finite_are_shown_and_do_not_raise(dtype) -> None:
    for wrong in (math.nan, math.inf, -math.inf):
        for rows in (slice(3, 4), slice(None)):
            x = normal(20, 6).to(dtype)
            x[rows, 2] = wrong
            for measure in OF_ROWS:
                assert math.isnan(measure(x)), measure
            assert not math.isfinite(length(x))
            for measure in (lidar, alignment):
                assert math.isnan(measure(x.unflatten(0, (10, 2))))
            if wrong != -math.inf:
                assert all(map(math.isnan, prototype_use(x.abs())))


@pytest.mark.parametrize("measure", OF_ROWS)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (5,)])
def test_no_rows_or_no_features_are_refused(measure, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"needs at least \d rows with features"):
        measure(torch.zeros(shape))


def test_ungrouped_rows_and_assignments_without_any_are_refused() -> None:
    for measure, name in ((lidar, "LiDAR"), (alignment, "alignment")):
        for shape in ((8, 5), (8, 1, 5)):
            with pytest.raises(UserError, match=f"{name} needs features .samples, views >= 2, D., but got"):
                measure(torch.zeros(shape))
    with pytest.raises(UserError, match=r"LiDAR delta=0 must be above 0"):
        lidar(torch.zeros(3, 2, 4), delta=0)
    for wrong in (-torch.ones(4, 3), torch.ones(0, 3), torch.ones(4, 0), torch.ones(3)):
        with pytest.raises(UserError, match="must be a row of shares"):
            prototype_use(wrong)
