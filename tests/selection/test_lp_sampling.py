"""lp sensitivities against their definition and a linear programme, unbiased samples, and what a sample promises."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.features.features import Features
from lightspan.selection.distortion import distortion, lp_regression
from lightspan.selection.lp_sampling import LpSample, Rule, scores
from lightspan.selection.sampling import allocated, bernoulli, inclusion
from lightspan.selection.selected import NamedSamples, SelectedData
from lightspan.selection.sensitivities import (
    in_column_space,
    leverage_scores,
    lewis_weights,
    lp_sensitivities,
)

PS = (1.0, 1.5, 2.0, 3.0, 4.0)


def matrix(rows: int = 60, heavy: bool = True, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_N4 = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    if heavy:
        x_N4[:3] *= 30
        x_N4[3:5] = torch.tensor([200.0, 0, 0, 0])
    return x_N4


def least_norm(x_ND: Tensor, row: int) -> float:
    """min |A x|_1 with a x = 1, by HiGHS."""
    a, (n, d) = x_ND.numpy(), x_ND.shape
    above = np.block([[a, -np.eye(n)], [-a, -np.eye(n)]])
    equal = np.concatenate([a[row], np.zeros(n)])[None]
    cost, bounds = np.r_[np.zeros(d), np.ones(n)], [(None, None)] * d + [(0, None)] * n
    return float(linprog(cost, A_ub=above, b_ub=np.zeros(2 * n), A_eq=equal, b_eq=[1], bounds=bounds).fun)


def test_at_p_2_sensitivities_are_leverage_scores_of_qr() -> None:
    x_ND = matrix()
    by_qr = torch.linalg.qr(x_ND).Q.square().sum(dim=1)
    assert torch.allclose(lp_sensitivities(in_column_space(x_ND), 2), by_qr, atol=1e-12)
    # The reweighting, which p = 2 does not need, gives them too.
    u_NR = in_column_space(x_ND)
    assert torch.allclose(lp_sensitivities(u_NR, 2.0, u_NR.clone()), by_qr, atol=1e-12)


def test_at_p_1_sensitivities_are_those_of_a_linear_programme() -> None:
    x_ND = matrix()
    sigma_N = lp_sensitivities(in_column_space(x_ND), 1)
    for row in (0, 3, 10, 40):
        assert float(sigma_N[row]) == pytest.approx(1 / least_norm(x_ND, row), rel=1e-6)


def test_above_2_sensitivities_are_those_of_a_general_minimiser() -> None:
    x_ND = matrix(30)
    u_NR = in_column_space(x_ND)
    for row in (0, 9):
        rule = {"type": "eq", "fun": lambda x, row=row: u_NR[row].numpy() @ x - 1}
        start = (u_NR[row] / u_NR[row].square().sum()).numpy()
        found = minimize(
            lambda x: float((u_NR @ torch.from_numpy(x)).pow(4).sum()), start, constraints=[rule], tol=1e-14
        )
        assert float(lp_sensitivities(u_NR, 4)[row]) == pytest.approx(1 / found.fun, rel=1e-3)


@settings(max_examples=10, deadline=None)
@given(p=st.sampled_from(PS), seed=st.integers(0, 1000))
def test_sensitivities_bound_every_direction_and_add_up_to_no_more_than_the_bound(p: float, seed: int) -> None:
    x_ND = matrix(30, seed=seed)
    sigma_N = lp_sensitivities(in_column_space(x_ND), p)
    x_DC = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    powers_NC = (x_ND @ x_DC).abs().pow(p)
    assert (sigma_N[:, None] >= powers_NC / powers_NC.sum(dim=0) - 1e-9).all()
    assert sigma_N.sum() <= 4 ** max(1, p / 2) + 1e-6


@pytest.mark.parametrize("p", PS)
def test_scores_are_of_the_span_and_not_of_its_columns(p: float) -> None:
    x_ND = matrix(30)
    mixed = x_ND @ torch.tensor([[1.0, 2, 0, 0], [0, 1, 3, 0], [0, 0, 1, -2], [1, 0, 0, 50]], dtype=torch.float64)
    deficient = torch.cat([mixed, mixed[:, :2]], dim=1)
    for rule in ("leverage", "root_leverage", "sensitivity", *(["lewis"] if p < 4 else [])):
        plain, other = (scores(in_column_space(x), rule, p) for x in (x_ND, deficient))
        assert torch.allclose(plain, other, rtol=1e-5, atol=1e-9), rule


def test_a_row_that_comes_twice_has_half_the_sensitivity() -> None:
    x_ND = matrix(20)
    for p in PS:
        once = lp_sensitivities(in_column_space(x_ND), p)
        twice = lp_sensitivities(in_column_space(torch.cat([x_ND, x_ND])), p)
        assert torch.allclose(twice[:20], once / 2, rtol=1e-6)


def test_a_row_of_zeros_has_no_score_and_is_never_drawn() -> None:
    u_NR = in_column_space(torch.cat([matrix(20), torch.zeros(2, 4, dtype=torch.float64)]))
    for rule in Rule.__args__:  # type: ignore[attr-defined]
        score_N = scores(u_NR, rule, 1.5)
        assert not score_N[20:].any(), rule
        assert (score_N[:20] > 0).all(), rule
        assert not inclusion(score_N, 20)[20:].any()


def test_lewis_weights_are_the_leverage_of_the_rows_that_they_rescale() -> None:
    u_NR = in_column_space(matrix())
    for p in (1.0, 1.5, 3.0):
        weight_N = lewis_weights(u_NR, p)
        rescaled = in_column_space(weight_N.pow(0.5 - 1 / p)[:, None] * u_NR)
        assert torch.allclose(leverage_scores(rescaled), weight_N, atol=1e-9)
        assert float(weight_N.sum()) == pytest.approx(4)


def test_sensitivities_against_a_sample_are_near_those_against_all_rows() -> None:
    u_NR = in_column_space(matrix(200))
    near = scores(u_NR, "sensitivity", 1.0, against=120)
    exact = scores(u_NR, "sensitivity", 1.0)
    assert torch.equal(scores(u_NR, "sensitivity", 1.0, against=200), exact)
    assert (near / exact - 1).abs().max() < 0.5
    # Rows that are all drawn alike count for the norm as often as they were left out.
    even_NR = in_column_space(matrix(120, heavy=False))
    near, exact = (scores(even_NR, "sensitivity", 3.0, against).sum() for against in (60, None))
    assert float(near) == pytest.approx(float(exact), rel=0.5)


@pytest.mark.parametrize("p", PS)
def test_root_leverage_is_the_leverage_to_the_half_of_p_and_rules_are_sums(p: float) -> None:
    u_NR = in_column_space(matrix(20))
    root, sensitivity = scores(u_NR, "root_leverage", p), scores(u_NR, "sensitivity", p)
    torch.testing.assert_close(root, u_NR.norm(dim=1) ** p)
    torch.testing.assert_close(scores(u_NR, "sensitivity_and_leverage", p), sensitivity + u_NR.norm(dim=1) ** 2)
    torch.testing.assert_close(scores(u_NR, "sensitivity_and_root_leverage", p), sensitivity + root)


@given(
    scores=st.lists(st.sampled_from([0.0, 1e-9, 0.1, 1.0, 1e9]), min_size=1, max_size=30).filter(any),
    share=st.floats(0.01, 1),
)
def test_chances_add_up_to_the_rows_asked_for(scores: list[float], share: float) -> None:
    score_N = torch.tensor(scores, dtype=torch.float64)
    rows = share * int((score_N > 0).sum())
    chance_N = inclusion(score_N, rows)
    assert float(chance_N.sum()) == pytest.approx(rows, rel=1e-9)
    assert ((chance_N > 0) == (score_N > 0)).all()
    assert chance_N.max() <= 1
    free = (chance_N < 1) & (score_N > 0)
    assert torch.allclose(chance_N[free] / chance_N[free].sum(), score_N[free] / score_N[free].sum())


def test_a_sample_estimates_the_norm_without_bias() -> None:
    x_ND, p, draws = matrix(40), 1.5, 2000
    power_N = (x_ND @ torch.tensor([1.0, -1, 0.5, 2], dtype=torch.float64)).abs().pow(p)
    chance_N = inclusion(scores(in_column_space(x_ND), "sensitivity", p), 15)
    sums = torch.stack([(power_N / chance_N)[bernoulli(chance_N, seed)].sum() for seed in range(draws)])
    assert abs(float(sums.mean() - power_N.sum())) < 3 * float(sums.std()) / math.sqrt(draws)


def test_a_sample_of_all_rows_has_no_distortion() -> None:
    u_NR = in_column_space(matrix(20))
    chance_N = inclusion(scores(u_NR, "sensitivity", 1.0), 20)
    drawn = bernoulli(chance_N, 0)
    assert drawn.tolist() == list(range(20))
    assert distortion(u_NR, drawn, 1 / chance_N[drawn], 1.0) < 1e-12


def test_distortion_sees_a_row_that_a_sample_left_out() -> None:
    u_NR = torch.eye(4, dtype=torch.float64)
    assert distortion(u_NR, torch.tensor([0, 1, 2]), torch.ones(3), 1.0) == pytest.approx(1)
    assert distortion(u_NR, torch.arange(4), torch.tensor([1.0, 1, 1, 3]), 2.0) == pytest.approx(2)


def test_at_p_2_the_distortion_is_nearly_the_largest_eigenvalue() -> None:
    u_NR = in_column_space(torch.randn(60, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    drawn, weight = torch.arange(0, 60, 2), torch.full((30,), 2.0, dtype=torch.float64)
    kept_RR = u_NR[drawn].T @ (weight[:, None] * u_NR[drawn])
    worst = float((torch.linalg.eigvalsh(kept_RR) - 1).abs().max())
    assert 0.99 * worst < distortion(u_NR, drawn, weight, 2.0) <= worst + 1e-9


def test_heavy_rows_are_kept_where_a_uniform_sample_loses_them() -> None:
    x_ND = matrix(200)
    x_ND[5:] *= 0.3
    u_NR = in_column_space(x_ND)
    for p in PS:
        worst = {}
        for rule in ("uniform", "sensitivity_and_leverage"):
            chance_N = inclusion(scores(u_NR, rule, p), 60)  # type: ignore[arg-type]
            drawn = [bernoulli(chance_N, seed) for seed in range(5)]
            worst[rule] = np.median([distortion(u_NR, one, 1 / chance_N[one], p) for one in drawn])
        assert worst["sensitivity_and_leverage"] < worst["uniform"] / 3, p


def test_lp_regression_is_the_median_at_1_and_least_squares_at_2() -> None:
    one_N1, y_N = torch.ones(5, 1), torch.tensor([0.0, 1, 2, 10, 100])
    assert lp_regression(one_N1, y_N, 1).item() == pytest.approx(2, abs=1e-6)
    assert lp_regression(one_N1, y_N, 2).item() == pytest.approx(22.6)
    weighted = lp_regression(one_N1, y_N, 1, torch.tensor([1.0, 1, 1, 10, 1]))
    assert weighted.item() == pytest.approx(10, abs=1e-6)


def test_a_budget_is_met_exactly_within_floors_and_what_there_is() -> None:
    assert allocated(np.array([1.0, 0, 3]), 10, floor=1).tolist() == [2, 1, 7]
    assert allocated(np.array([1.0, 1, 1]), 10).tolist() == [4, 3, 3]
    assert allocated(np.array([100.0, 1, 0]), 10, most_T=np.array([2, 5, 9])).tolist() == [2, 5, 3]
    assert allocated(np.zeros(4), 8).tolist() == [2, 2, 2, 2]


@given(
    scores=st.lists(st.floats(0, 100), min_size=1, max_size=20),
    floor=st.integers(0, 5),
    extra=st.integers(0, 100),
)
def test_budgets_hold_for_any_scores(scores: list[float], floor: int, extra: int) -> None:
    budget = floor * len(scores) + extra
    counts = allocated(np.array(scores), budget, floor)
    assert counts.sum() == budget
    assert counts.min() >= floor
    ascending = np.argsort(scores)
    assert (np.diff(counts[ascending]) >= -1).all()


def features(x: Tensor, **columns: Any) -> Features:
    return Features(x, index_N=torch.arange(len(x)), **columns)


def of(count: int) -> NamedSamples:
    return NamedSamples(count, "0" * 32, (count,))


def test_the_selection_holds_the_drawn_rows_with_the_inverse_of_their_chances() -> None:
    x_ND = matrix()
    found = LpSample(20, p=1.0, constant=False).fit(features(x_ND.float()), of(60))
    selection = found.selection()
    chance_N = inclusion(scores(in_column_space(x_ND.float()), "sensitivity_and_leverage", 1.0), 20)
    drawn = bernoulli(chance_N, 0)
    assert selection.index_n.tolist() == drawn.tolist()
    assert selection.weight_n == pytest.approx((1 / chance_N[drawn]).numpy())
    assert {0, 1, 2} <= set(drawn.tolist())
    assert found.measured["distortion at p = 1"] < found.measured["distortion of a uniform sample"]
    assert found.picture("title") is not None
    assert SelectedData.from_json(found.to_json()) == found


def test_rows_that_are_a_part_of_the_samples_keep_their_places() -> None:
    x_ND = matrix()
    part = Features(x_ND, index_N=torch.arange(60) * 3 + 1)
    whole = LpSample(20, p=1.0).fit(features(x_ND), of(60)).selection()
    assert LpSample(20, p=1.0).fit(part, of(200)).selection().index_n.tolist() == (whole.index_n * 3 + 1).tolist()


def test_a_regression_on_the_sample_is_nearly_as_good_on_all_rows() -> None:
    x_ND = matrix(300)
    noise = torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y_N = x_ND @ torch.tensor([1.0, 2, 3, 4], dtype=torch.float64) + noise
    for columns in ({"label_N": y_N}, {"fields": {"target": y_N}}):
        found = LpSample(80, p=1.0).fit(features(x_ND, **columns), of(300))
        assert 1 <= found.measured["loss over the least"] < 1.15
    assert "loss over the least" not in LpSample(80, target=False).fit(features(x_ND, label_N=y_N), of(300)).measured
    exact = LpSample(80).fit(features(x_ND, label_N=x_ND[:, 0]), of(300))
    assert "loss over the least" not in exact.measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_and_degenerate_rows_have_an_answer(dtype: torch.dtype) -> None:
    for x_ND in (
        torch.ones(30, 3),
        matrix(30).float() * 1e30,
        matrix(30).float() * 1e-30,
        matrix(30)[:, :1].float(),
        torch.eye(30),
        torch.cat([torch.zeros(29, 2), torch.ones(1, 2)]),
    ):
        found = LpSample(1 if not x_ND[0].any() else 10, constant=False).fit(features(x_ND.to(dtype)), of(30))
        assert 1 <= found.kept <= 30
    one = LpSample(1).fit(features(torch.ones(1, 2, dtype=dtype)), of(1))
    assert (one.kept, one.measured["distortion at p = 2"]) == (1, 0)


def test_fewer_components_are_the_strongest_ones() -> None:
    x_ND = matrix(50)
    assert LpSample(10, components=2).fit(features(x_ND), of(50)).measured["rank"] == 3
    assert LpSample(10, components=9).fit(features(x_ND), of(50)).measured["rank"] == 5


NAN = float("nan")
X = matrix(30)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: LpSample(0), "rows=0"),
        (lambda: LpSample(5, p=0.5), "p=0.5"),
        (lambda: LpSample(5, p=NAN), "p=nan"),
        (lambda: LpSample(5, p=4.0, rule="lewis"), "p=4.0"),
        (lambda: LpSample(5, rule="guess"), "rule='guess'"),  # type: ignore[arg-type]
        (lambda: LpSample(5, components=0), "components=0"),
        (lambda: LpSample(5, against=0), "against=0"),
        (lambda: LpSample(5, seed=-1), "seed=-1"),
        (lambda: LpSample(31).fit(features(X), of(30)), "rows=31 cannot be drawn of 30 rows"),
        (lambda: LpSample(5).fit(features(X * NAN), of(30)), "finite numbers"),
        (lambda: LpSample(5, constant=False).fit(features(X * 0), of(30)), "all features are 0"),
        (lambda: LpSample(5).fit(features(X[:, :0]), of(30)), r"a matrix \[N, D\]"),
        (lambda: LpSample(5).fit(features(X, label_N=X[:, 0] * NAN), of(30)), "finite targets"),
        (lambda: LpSample(5).fit(features(X), of(29)), r"in \[0, 29\)"),
        (lambda: LpSample(5).fit(Features(X), of(40)), "no index, and the data have 40"),
        (lambda: LpSample(5).fit(features(X[:, None].expand(30, 2, 4)), of(30)), "set pool"),
        (lambda: lp_sensitivities(torch.eye(4000, dtype=torch.float64), 1.0), "above 1e.13"),
        (lambda: inclusion(torch.tensor([1.0, NAN]), 1), "finite and at least 0"),
        (lambda: allocated(np.array([1.0, 1]), 5, floor=3), "budget=5 is less than the floor=3"),
        (lambda: allocated(np.array([1.0, 1]), 5, most_T=np.array([1, 2])), "budget=5 is more than the 3 rows"),
        (lambda: allocated(np.array([1.0, -1]), 5), "scores of a budget"),
    ],
)
def test_bad_input_is_refused_with_its_name(wrong: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        wrong()
