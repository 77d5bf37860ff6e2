"""Scaling laws: planted curves come back, intervals cover the truth, and what points cannot say is said."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from lightspan.core.errors import UserError
from lightspan.evaluation import scaling_laws as laws
from lightspan.evaluation.scaling_laws import LOG_LINEAR, POWER_LAW, SATURATING_LOG, CurveForm, fit, scaling_curve

SIZES = np.array([300, 1_000, 3_000, 10_000, 30_000])
FAR = 300_000
TRUTHS = {
    "log-linear": (LOG_LINEAR, lambda n: 0.1 + 0.15 * np.log10(n), {"a": 0.1, "b": 0.15}),
    "power law": (POWER_LAW, lambda n: 0.93 - 3.1 * n**-0.41, {"s_inf": 0.93, "c": -3.1, "beta": 0.41}),
    "power law of a loss": (POWER_LAW, lambda n: 1.7 + 12.0 * n**-0.29, {"s_inf": 1.7, "c": 12.0, "beta": 0.29}),
    "saturating log": (
        SATURATING_LOG,
        lambda n: 0.1 + 0.15 * np.log10(n / (1 + n / 5_000)),
        {"a": 0.1, "b": 0.15, "N_sat": 5_000.0},
    ),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_planted_numbers_come_back_to_a_millionth_and_so_does_the_prediction(name: str) -> None:
    form, truth, numbers = TRUTHS[name]
    n = SIZES.astype(float)
    for top in (None, 1.0) if truth(n).max() < 1 else (None,):
        found = fit(form, n, truth(n), top)
        assert found.numbers() == pytest.approx(numbers, rel=1e-6)
        assert found.at(FAR) == pytest.approx(truth(float(FAR)), rel=1e-6)


@pytest.mark.parametrize("name", TRUTHS)
def test_the_planted_form_is_chosen_by_the_largest_size_left_out(name: str) -> None:
    form, truth, _ = TRUTHS[name]
    curve = scaling_curve(SIZES.tolist(), truth(SIZES.astype(float))[None].repeat(3, 0))
    assert curve.best.law.form is form
    assert curve.best.left_out < 1e-6
    assert curve.tenfold.value == pytest.approx(truth(float(FAR)), rel=1e-6)


@pytest.mark.sample(1)
@pytest.mark.parametrize("form", [LOG_LINEAR, POWER_LAW], ids=lambda form: form.name)
def test_intervals_of_three_seeds_cover_the_truth_at_one_per_cent_of_noise(form: CurveForm) -> None:
    _, truth, numbers = TRUTHS[form.name]
    draws, covered = np.random.default_rng(0), dict.fromkeys({"b", "beta", "s_inf"} & numbers.keys(), 0)
    exact, resampled = truth(SIZES.astype(float)), laws._resamples(3)
    chances = tuple(chance for _, chance in resampled)
    for _ in range(200):
        noisy = exact * (1 + 0.01 * draws.standard_normal((3, len(SIZES))))
        drawn = tuple(fit(form, SIZES, share @ noisy) for share, _ in resampled)
        found = laws.FormFit(fit(form, SIZES, noisy.mean(0)), 0.0, drawn, (), chances, 3).numbers()
        for name in covered:
            covered[name] += found[name].low <= numbers[name] <= found[name].high
    assert covered
    assert min(covered.values()) >= 180


def test_the_interval_of_a_slope_is_students_over_the_slopes_of_the_seeds() -> None:
    """Of a linear fit, whose resampled deviation is known exactly."""
    draws = np.random.default_rng(1)
    for seeds in (2, 3, 5):
        scores = 0.1 * np.log10(SIZES) + 0.02 * draws.standard_normal((seeds, len(SIZES)))
        slopes = np.polyfit(np.log10(SIZES), scores.T, 1)[0]
        found = scaling_curve(SIZES.tolist(), scores).per_decade
        error = slopes.std(ddof=1) / math.sqrt(seeds)
        assert found.value == pytest.approx(slopes.mean())
        reach = t.ppf(0.975, seeds - 1) * error
        assert (found.low, found.high) == pytest.approx((slopes.mean() - reach, slopes.mean() + reach))


def test_with_a_top_the_line_is_numpys_with_weights_by_errors_and_what_is_left_out_a_logarithm_of_them() -> None:
    scores = np.array([0.41, 0.62, 0.70, 0.88, 0.93])
    for top, values in ((1.0, scores), (0.0, 1 - scores)):
        slope, level = np.polyfit(np.log10(SIZES), values, 1, w=1 / (1 - scores))
        numbers = fit(LOG_LINEAR, SIZES, values, top).numbers()
        assert numbers == pytest.approx({"a": level, "b": slope})
        slope, level = np.polyfit(np.log10(SIZES[:-1]), values[:-1], 1, w=1 / (1 - scores[:-1]))
        error = abs(top - (level + slope * np.log10(SIZES[-1])))
        found = scaling_curve(SIZES.tolist(), values[None], top).fits[0].left_out
        assert found == pytest.approx(abs(math.log(error / 0.07)))


def test_resamples_of_more_seeds_than_five_are_random_and_always_the_same() -> None:
    one, other = laws._resamples(8), laws._resamples(8)
    assert len(one) == laws.MOST_RESAMPLES
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))
    for count in (1, 3, 8):
        shares = laws._resamples(count)
        assert sum(chance for _, chance in shares) == pytest.approx(1)
        assert all(share.sum() == pytest.approx(1) for share, _ in shares)


def notes(scores: np.ndarray, sizes: np.ndarray = SIZES, top: float | None = None) -> str:
    return "\n".join(scaling_curve(sizes.tolist(), scores, top).notes)


def test_what_points_cannot_say_is_said() -> None:
    line = np.log10(SIZES) * 0.1
    noise = 0.02 * np.random.default_rng(0).standard_normal((3, 5))
    assert "three sizes determine the log-linear form alone" in notes(line[None, :3], SIZES[:3])
    assert "four sizes cannot separate a logarithm from a power law" in notes(line[None, :4], SIZES[:4])
    assert "one seed: no interval" in notes(line[None])
    assert "the points cannot separate 3 forms" in notes(line + noise)
    assert "the points cannot separate" not in notes(TRUTHS["power law"][1](SIZES.astype(float)) + noise / 1e5)
    bent = TRUTHS["saturating log"][1](SIZES.astype(float)) + noise / 10
    assert "the curve bends: +0.136 per decade" in notes(bent)
    assert "bends" not in notes(line + noise)
    assert "saturated, within 2 % of 1" in notes(np.array([[0.9, 0.95, 0.97, 0.98, 0.99]] * 2), top=1.0)


def test_a_ceiling_just_below_the_smallest_size_is_found() -> None:
    n = SIZES.astype(float)
    found = fit(SATURATING_LOG, n, 0.1 + 0.15 * np.log10(n / (1 + n / 120))).numbers()
    assert found == pytest.approx({"a": 0.1, "b": 0.15, "N_sat": 120.0}, rel=1e-6)


def test_of_forms_that_miss_by_less_than_a_billionth_the_simplest_is_taken() -> None:
    draws, least = np.random.default_rng(0), []
    for _ in range(4):
        curve = scaling_curve(SIZES.tolist(), 0.5 + 1e-12 * draws.standard_normal((1, 5)))
        assert curve.best.law.form is LOG_LINEAR
        least.append(min(curve.fits, key=lambda one: one.left_out).law.form)
    assert {*least} != {LOG_LINEAR}


def test_an_interval_is_as_wide_as_the_resamples_spread_about_their_own_mean() -> None:
    """Which a form that bends does not have at its estimate."""
    reach = t.ppf(0.975, 1) * math.sqrt(2)
    assert laws._interval(5.0, [1.0, 3.0], [0.5, 0.5], 2).record() == {
        "value": 5.0,
        "low": pytest.approx(5 - reach),
        "high": pytest.approx(5 + reach),
    }


def test_an_error_of_nothing_counts_as_a_thousandth_of_the_largest() -> None:
    """A line through the first two scores reaches the top, where the third has a tenth left."""
    found = laws._left_out(LOG_LINEAR, np.array([10, 100, 1000]), np.array([0.2, 0.6, 0.9]), 1.0)
    assert found == pytest.approx(math.log(0.1 / 0.0008))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_curve_bends_if_the_loss_of_slope_is_beyond_students_t(sign: int) -> None:
    """Of three seeds that lose m - 1, m and m + 1, that is at m = t / sqrt(3)."""
    sizes = np.array([10, 100, 1000, 10_000])
    for lost, bends in ((2.4, False), (2.6, True), (-2.6, False)):
        assert bends == (lost > t.ppf(0.975, 2) / math.sqrt(3))
        first_S1 = 10 + lost + np.array([[-1.0], [0.0], [1.0]])
        scores = sign * np.concatenate([0 * first_S1, first_S1, first_S1 + 10, first_S1 + 20], axis=1)
        assert ("bends" in notes(scores, sizes)) == bends


def test_a_score_near_a_top_of_zero_is_saturated_too() -> None:
    assert "saturated, within 2 % of 0" in notes(np.array([[0.5, 0.2, 0.1, 0.04, 0.019]]), top=0.0)
    assert "saturated" not in notes(np.array([[0.5, 0.2, 0.1, 0.04, 0.021]]), top=0.0)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 30.0])
def test_rounding_does_not_bend_a_straight_line(scale: float) -> None:
    """Of seeds that are parallel to one another, whose slopes differ by rounding alone."""
    for sizes in (SIZES, np.array([8, 16, 32, 64]), np.array([7, 11, 13, 170])):
        lines = scale * np.log10(sizes) + scale * np.arange(3)[:, None] / 7
        assert "bends" not in notes(lines, sizes)


def test_one_seed_has_estimates_and_no_interval() -> None:
    curve = scaling_curve([10, 100, 1000], np.array([[0.1, 0.2, 0.3]]))
    assert curve.per_decade.record() == {"value": pytest.approx(0.1), "low": None, "high": None}
    assert [one.law.form.name for one in curve.fits] == ["log-linear"]
    assert curve.tenfold.value == pytest.approx(0.4)


@settings(deadline=None, max_examples=6)
@given(
    scores=st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=10, max_size=10),
    top=st.sampled_from([None, 0.0, 1.0]),
)
def test_any_scores_give_finite_numbers(scores: list[float], top: float | None) -> None:
    """Also constant ones, perfect ones, and those that fall with the data."""
    curve = scaling_curve(SIZES.tolist(), np.array(scores).reshape(2, 5), top)
    for one in curve.fits:
        ends = [one.at(FAR), *one.numbers().values()]
        values = [one.left_out, *(x for interval in ends for x in interval.record().values() if x is not None)]
        assert np.isfinite(values).all()


def test_a_constant_curve_gains_nothing() -> None:
    curve = scaling_curve(SIZES.tolist(), np.full((3, 5), 0.7), 1.0)
    assert curve.per_decade.value == pytest.approx(0, abs=1e-12)
    assert curve.best.law.form is LOG_LINEAR
    assert curve.tenfold.value == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("sizes", "scores", "said"),
    [
        ([10, 100], [[0.1, 0.2]], "needs 3 or more sizes in ascending order"),
        ([100, 10, 1000], [[0.1, 0.2, 0.3]], "in ascending order"),
        ([10, 100, 1000], [[0.1, 0.2]], r"scores of 3 sizes are \[S, 3\]"),
        ([10, 100, 1000], [[0.1, math.nan, 0.3]], "a score is not finite"),
    ],
)
def test_what_is_no_curve_is_refused(sizes: list[int], scores: list[list[float]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        scaling_curve(sizes, np.array(scores))
