"""Units of two networks: matching, sparse maps, clusters and spans against exact cases and independent programs."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.linear_model import Lasso
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.convergence import (
    correlations,
    explained,
    half_square,
    joint_clusters,
    matched,
    semi_matched,
    sparse_map,
    standardised,
)
from lightspan.evaluation.geometry.convergent_learning import ConvergentLearning
from lightspan.evaluation.geometry.moments import Moments


def drawn(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def between(x: Tensor, y: Tensor) -> Tensor:
    return correlations(Moments.of(torch.cat([x, y], dim=1)), x.shape[1])[1]


def test_correlations_in_batches_are_those_of_numpy() -> None:
    x, y = drawn(100, 4) @ drawn(4, 4, 1) + 1e6, drawn(100, 3, 2)
    y = y + x[:, :3]
    sums = Moments.of(torch.zeros(0, 7))
    for part in torch.cat([x, y], dim=1).split(13):
        sums += Moments.of(part)
    whole = torch.from_numpy(np.corrcoef(torch.cat([x, y], dim=1).T.numpy()))
    found = correlations(sums, 4)
    for ours, theirs in zip(found, (whole[:4, :4], whole[:4, 4:], whole[4:, 4:]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_a_unit_that_never_changes_correlates_with_nothing() -> None:
    x = drawn(20, 3)
    x[:, 1] = 7.0
    found = between(x, x)
    assert not found[1].any()
    assert not found[:, 1].any()
    torch.testing.assert_close(found[0, 0], torch.tensor(1.0, dtype=torch.float64))


def test_permuted_and_rescaled_units_are_found_again_each_at_correlation_one() -> None:
    x = drawn(200, 12) @ drawn(12, 12, 1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    y = x[:, order] * torch.linspace(0.1, 9, 12) + 5
    c = between(x, y)
    rows, partners = matched(c)
    assert torch.equal(order[partners], rows)
    torch.testing.assert_close(c[rows, partners], torch.ones(12, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(semi_matched(c), partners)


def test_the_matching_is_scipys_and_no_semi_matching_has_less() -> None:
    for width in (3, 8, 20):  # narrower and wider than the first
        c = between(drawn(50, 8), drawn(50, width, 5))
        rows, partners = matched(c)
        assert c[rows, partners].sum() == pytest.approx(
            c.numpy()[linear_sum_assignment(c.numpy(), maximize=True)].sum()
        )
        assert len(set(partners.tolist())) == len(rows) == min(8, width)
        assert c[rows, semi_matched(c)[rows]].sum() >= c[rows, partners].sum()


def test_a_sparse_map_is_scikit_learns_lasso_and_starts_do_not_matter() -> None:
    x = drawn(80, 15) @ drawn(15, 15, 1)  # far from orthogonal
    y = x @ drawn(15, 4, 2) + 5 * drawn(80, 4, 3)
    x, y = standardised(x), standardised(y)
    for penalty in (0.3, 0.03):
        theirs = Lasso(alpha=penalty, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x.numpy(), y.numpy())
        for start in (None, drawn(15, 4, 4)):
            ours = sparse_map(x, y, penalty, start)
            torch.testing.assert_close(ours, torch.from_numpy(theirs.coef_.T), atol=1e-4, rtol=0)
    assert not sparse_map(x, y, 1.1).any()  # no correlation is above 1
    assert half_square(x, sparse_map(x, y, 1.1), y) == pytest.approx(0.5)


def test_without_a_penalty_a_map_is_the_shortest_of_least_squares() -> None:
    x, y = drawn(30, 6), drawn(30, 3, 1)
    x = torch.cat([x, x[:, :2], torch.zeros(30, 1)], dim=1)  # units twice, and one that is dead
    torch.testing.assert_close(sparse_map(x, y, 0.0), torch.linalg.pinv(x) @ y, atol=1e-9, rtol=0)
    with pytest.raises(UserError, match="penalty"):
        sparse_map(x, y, -1.0)


def blocks(rows: int = 2000) -> tuple[Tensor, Tensor, Tensor]:
    """Units in three groups that hang together, the second network's turned within each group; the groups."""
    group = torch.arange(12) // 4
    common = drawn(rows, 3, 1)
    x = common[:, group] + 0.8 * drawn(rows, 12)
    turn = torch.block_diag(*(torch.linalg.qr(drawn(4, 4, seed)).Q for seed in range(3)))
    return x, x @ turn, group


def test_turned_groups_lose_their_units_but_keep_their_span_and_clusters() -> None:
    x, y, group = blocks()
    c = between(x, y)
    assert c[matched(c)].mean() < 0.9
    both = standardised(x), standardised(y)
    fit, held = [[each[part] for each in both] for part in (slice(1500), slice(1500, None))]
    assert explained((fit[0], fit[1]), (held[0], held[1])) == pytest.approx(1, abs=1e-9)
    sums = Moments.of(torch.cat([x, y], dim=1))
    first, second = joint_clusters(*correlations(sums, 12), clusters=3)
    assert adjusted_rand_score(torch.cat([group, group]), torch.cat([first, second])) == 1
    found = ConvergentLearning(clusters=3, directions=12, penalties=(0.0,)).fit(Features(x), Features(y))
    for name in ("linear", "within_shared", "span", "shared"):
        assert found.found[name] == pytest.approx(1, abs=1e-6)
    assert found.found["cka"] == pytest.approx(1, abs=1e-6)
    assert found.maps[0]["left"] == pytest.approx(0, abs=1e-9)


def test_a_half_that_is_copied_is_told_from_a_half_that_is_not_and_from_the_floor() -> None:
    x = drawn(1000, 20)
    y = torch.cat([x[:, :10] + 0.3 * drawn(1000, 10, 1), drawn(1000, 10, 2)], dim=1)
    found = ConvergentLearning().fit(Features(x), Features(y))
    highest = max(found.chance)
    assert {row["unit"] for row in found.units if row["correlation"] > highest} == set(range(10))
    assert all(row["partner"] == row["unit"] for row in found.units[:10])
    assert found.found["matched"] > found.floors["matched"] + 0.3
    table = found.table()
    assert sum(row["floor"] for row in table) / 20 == pytest.approx(found.floors["matched"])
    assert sum(row["best_floor"] for row in table) / 20 == pytest.approx(found.floors["semi_matched"])
    assert found.found["linear"] > 0.3
    assert found.floors["linear"] < 0.05
    assert abs(found.floors["cka"]) < 0.05


def test_a_unit_that_hardly_ever_changes_weighs_little_in_what_a_map_explains() -> None:
    x = drawn(100, 3)
    rare = torch.zeros(100, 1, dtype=torch.float64)
    rare[3] = 1.0  # never in held-out rows, where its variance is rounding
    both = standardised(x), standardised(torch.cat([x, rare], dim=1))
    fit, held = [[each[part] for each in both] for part in (slice(80), slice(80, None))]
    assert explained((fit[0], fit[1]), (held[0], held[1])) > 0.9
    assert explained((fit[0], fit[1][:, 3:]), (held[0], held[1][:, 3:])) == 0


def test_a_unit_that_fires_once_does_not_outweigh_all_others() -> None:
    x = drawn(200, 5)
    for row in range(20):  # some of these are held out
        once = torch.zeros(200, 1, dtype=torch.float64)
        once[row], once[row + 100] = 1.0, 1e-6
        found = ConvergentLearning().fit(Features(x), Features(torch.cat([x @ drawn(5, 20, 1), once], dim=1)))
        assert found.found["linear"] > 0.5


def test_dead_units_are_counted_and_left_out_under_their_own_numbers() -> None:
    x = drawn(50, 4)
    dead = torch.cat([torch.zeros(50, 1), x, torch.ones(50, 1)], dim=1)
    found = ConvergentLearning().fit(Features(dead), Features(x))
    assert found.dead == (2, 0)
    assert [(row["unit"], row["partner"]) for row in found.units] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    with pytest.raises(UserError, match="second"):
        ConvergentLearning().fit(Features(x), Features(torch.ones(50, 3)))


def test_narrower_second_networks_leave_units_without_a_partner() -> None:
    x = drawn(50, 6)
    found = ConvergentLearning().fit(Features(x), Features(x[:, :2]))
    assert sorted(row["partner"] for row in found.units) == [-1, -1, -1, -1, 0, 1]
    assert found.contested > 0
    partners = np.corrcoef(x.T)[:, :2]
    assert found.found["semi_matched"] == pytest.approx(partners.max(axis=1).mean())
    assert found.found["matched"] == pytest.approx(1)


def test_positions_are_samples_and_both_networks_need_the_same() -> None:
    x = drawn(60, 5)
    as_rows = ConvergentLearning().fit(Features(x), Features(x * 2))
    as_positions = ConvergentLearning().fit(Features(x.view(20, 3, 5)), Features((x * 2).view(20, 3, 5)))
    assert as_positions == as_rows
    with pytest.raises(UserError, match="positions"):
        ConvergentLearning().fit(Features(x.view(20, 3, 5)), Features(x.view(20, 1, 15)))
    with pytest.raises(UserError, match="penalties"):
        ConvergentLearning(penalties=())
