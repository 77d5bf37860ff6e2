"""How a score grows with the number of training samples: fits of three forms, their intervals, and ten times the data.

    log-linear       s = a + b log10 N
    power law        s = s_inf + c N^-beta                     as e = e_inf + c' N^-beta where errors are e = |top - s|
    saturating log   s = a + b log10(N / (1 + N / N_sat))      log-linear far below N_sat, constant far above

Source: Sun et al., "Revisiting Unreasonable Effectiveness of Data in Deep Learning Era", ICCV 2017, arXiv 1707.02968
(the first form, section 5); Hestness et al., "Deep Learning Scaling is Predictable, Empirically", 2017, arXiv
1712.00409 (the second, equation 1). The third has no source that we know of: it is the first with a ceiling.
Each form is level + scale * f(N; shape) with at most one shape, so that level and scale follow by least squares and
only the shape is searched for.
Scores with a perfect value `top`, such as accuracies, saturate towards it: their errors are compared by logarithms, in
the fits to first order, with weights 1 / |top - s|.
Shapes: K sizes, S seeds, G places of a grid.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import stdtrit

from lightspan.core.errors import UserError

FEWEST_SIZES = 3
GRID = 100
MOST_RESAMPLES = 500
LEAST_SHARE = 1e-3
"""Of the largest error: smaller ones count as this, since the logarithm of nothing is infinite."""
EQUAL = 1e-9
"""Left-out errors that differ by less are those of one curve in two forms."""
NEAR_TOP = 0.02
"""Share of a perfect score: closer to it, a score says little."""


@dataclass(frozen=True)
class CurveForm:
    """level + scale * f(N; shape), where N is over its geometric mean over all sizes.

    Attributes:
        text: its equation.
        basis: (log10 of N over the mean [K], shapes [G, 1]) -> f [G, K].
        span: (log10 of the smallest N, of the largest, both over the mean) -> least and most shape; None: without one.
    """

    name: str
    text: str
    basis: Callable[[np.ndarray, np.ndarray], np.ndarray]
    span: Callable[[float, float], tuple[float, float]] | None = None

    @property
    def unknowns(self) -> int:
        return 2 if self.span is None else 3


LOG_LINEAR = CurveForm("log-linear", "s = a + b log10 N", lambda x_K, shape_G1: x_K + 0 * shape_G1)
POWER_LAW = CurveForm(
    "power law", "s = s_inf + c N^-beta", lambda x_K, beta_G1: 10.0 ** (-beta_G1 * x_K), lambda low, high: (0.01, 4.0)
)
SATURATING_LOG = CurveForm(
    "saturating log",
    "s = a + b log10(N / (1 + N / N_sat))",
    lambda x_K, at_G1: x_K - np.log10(1 + 10.0 ** (x_K - at_G1)),
    lambda low, high: (low - 0.5, high + 2.0),
)
FORMS = (LOG_LINEAR, POWER_LAW, SATURATING_LOG)
"""The simplest first, which is taken where several predict equally well."""


@dataclass(frozen=True)
class Law:
    """A form with its numbers.

    Attributes:
        centre: log10 of the N over which all others are counted.
        shape: beta, or log10 of N_sat over that N; 0 without one.
    """

    form: CurveForm
    centre: float
    level: float
    scale: float
    shape: float

    def at(self, size: float) -> float:
        """The score with so many samples."""
        x_K = np.array([math.log10(size) - self.centre])
        return float(self.level + self.scale * self.form.basis(x_K, np.array([[self.shape]]))[0, 0])

    def numbers(self) -> dict[str, float]:
        """Those of the equation in `CurveForm.text`, by name."""
        if self.form is POWER_LAW:
            c = self.scale * 10.0 ** (self.shape * self.centre)
            return {"s_inf": self.level, "c": c, "beta": self.shape}
        line = {"a": self.level - self.scale * self.centre, "b": self.scale}
        return line if self.form is LOG_LINEAR else line | {"N_sat": 10.0 ** (self.shape + self.centre)}


def fit(form: CurveForm, sizes_K: np.ndarray, scores_K: np.ndarray, top: float | None = None) -> Law:
    """Least squares, by the logarithm of errors where there is a `top`.

    Args:
        sizes_K: different numbers of samples, above 0; at least as many as the form has unknowns.
        scores_K: finite.
    """
    log_K = np.log10(np.asarray(sizes_K, dtype=np.float64))
    centre = float(log_K.mean())
    x_K, y_K = log_K - centre, np.asarray(scores_K, dtype=np.float64)
    weight_K = 1 / errors(y_K, top) ** 2 if top is not None else np.ones_like(y_K)
    weight_K = weight_K / weight_K.sum()

    def solved(shape_G1: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(squared error, level, scale) of the best line through f and s, each [G]."""
        f_GK = form.basis(x_K, shape_G1)
        f_G1, y = f_GK @ weight_K[:, None], float(weight_K @ y_K)
        spread_GK = f_GK - f_G1
        variance_G = spread_GK**2 @ weight_K
        scale_G = (spread_GK * (y_K - y)) @ weight_K / np.maximum(variance_G, np.finfo(float).tiny)
        residual_GK = y_K - y - scale_G[:, None] * spread_GK
        return residual_GK**2 @ weight_K, y - scale_G * f_G1[:, 0], scale_G

    shape = 0.0
    if form.span is not None:
        low, high = form.span(float(x_K.min()), float(x_K.max()))
        grid_G = np.geomspace(low, high, GRID) if low > 0 else np.linspace(low, high, GRID)
        best = int(solved(grid_G[:, None])[0].argmin())
        around = (float(grid_G[max(best - 1, 0)]), float(grid_G[min(best + 1, GRID - 1)]))
        found = minimize_scalar(
            lambda at: float(solved(np.array([[at]]))[0][0]),
            bounds=around,
            method="bounded",
            options={"xatol": 1e-9, "maxiter": 60},
        )
        shape = float(found.x)
    _, level_G, scale_G = solved(np.array([[shape]]))
    return Law(form, centre, float(level_G[0]), float(scale_G[0]), shape)


def errors(scores: np.ndarray, top: float) -> np.ndarray:
    """|top - s|, at least a small share of the largest: positive, whatever the scores."""
    found = np.abs(top - scores)
    return np.maximum(found, max(LEAST_SHARE * float(found.max()), float(np.finfo(np.float32).tiny)))


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval, which are None with one seed."""

    value: float
    low: float | None = None
    high: float | None = None

    def record(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


def _interval(value: float, drawn: Sequence[float], chances: Sequence[float], seeds: int) -> Interval:
    """Of a value that was drawn again for each resample of so many seeds."""
    if seeds < 2:
        return Interval(value)
    values, chance = np.array(drawn), np.array(chances)
    variance = float(chance @ (values - chance @ values) ** 2) * seeds / (seeds - 1)
    reach = float(stdtrit(seeds - 1, 0.975)) * math.sqrt(variance)
    return Interval(value, value - reach, value + reach)


def bootstrapped(statistic: Callable[[np.ndarray], float], seeds: int) -> Interval:
    """A statistic of scores of seeds and its 95 % interval, from resamples of the seeds as `scaling_curve` takes them.

    Args:
        statistic: (share of each seed [S], adding to 1) -> a finite number; `share_S @ scores_SK` are mean scores.
        seeds: S, at least 1.
    """
    draws = _resamples(seeds)
    value = statistic(np.full(seeds, 1 / seeds))
    return _interval(value, [statistic(share_S) for share_S, _ in draws], [chance for _, chance in draws], seeds)


def log_slope(sizes_K: Sequence[float], risks_SK: np.ndarray) -> Interval:
    """b of risk ~ N^b, by least squares on logarithms of mean risks over seeds, with its interval.

    Args:
        sizes_K: at least 2 different ones above 0.
        risks_SK: above 0; row s is a seed.
    Raises: UserError for others.
    """
    sizes, risks_SK = np.asarray(sizes_K, dtype=np.float64), np.asarray(risks_SK, dtype=np.float64)
    if len(set(sizes.tolist())) < 2 or not (sizes > 0).all() or not (risks_SK > 0).all():
        raise UserError(f"a rate needs 2 different sizes and risks above 0, and got sizes {[*sizes_K]}")
    x_K = np.log(sizes) - np.log(sizes).mean()
    return bootstrapped(lambda share_S: float(x_K @ np.log(share_S @ risks_SK) / (x_K @ x_K)), len(risks_SK))


@dataclass(frozen=True)
class FormFit:
    """A form on all sizes.

    Attributes:
        left_out: how far it was from the largest size when fitted without it: a difference of scores, or with a `top`
            of natural logarithms of errors.
        drawn: fitted to each of the resamples.
        drawn_left_out: as `left_out`, of each of the resamples.
        chances: of the resamples, adding to 1.
        seeds: S.
    """

    law: Law
    left_out: float
    drawn: tuple[Law, ...]
    drawn_left_out: tuple[float, ...]
    chances: tuple[float, ...]
    seeds: int

    def at(self, size: float) -> Interval:
        """The score with so many samples."""
        return self._interval(self.law.at(size), [law.at(size) for law in self.drawn])

    def numbers(self) -> dict[str, Interval]:
        """Those of the equation; factors of N, and N_sat, whose deviations say little, have no interval."""
        drawn = [law.numbers() for law in self.drawn]
        return {
            name: Interval(value) if name in ("c", "N_sat") else self._interval(value, [one[name] for one in drawn])
            for name, value in self.law.numbers().items()
        }

    def _interval(self, value: float, drawn: Sequence[float]) -> Interval:
        return _interval(value, drawn, self.chances, self.seeds)


@dataclass(frozen=True)
class ScalingCurve:
    """What the scores say.

    Attributes:
        fits: of all forms that the sizes determine, the simplest first, which is the log-linear one.
        best: the one of them that predicts the largest size best when that is left out.
        notes: what the reader must know.
    """

    sizes: tuple[int, ...]
    top: float | None
    fits: tuple[FormFit, ...]
    best: FormFit
    notes: tuple[str, ...]

    @property
    def per_decade(self) -> Interval:
        """b of the log-linear form: what ten times the data add along a straight line."""
        return self.fits[0].numbers()["b"]

    @property
    def tenfold(self) -> Interval:
        """What ten times the largest size would give, by the best form."""
        return self.best.at(10 * self.sizes[-1])


def scaling_curve(sizes_K: Sequence[int], scores_SK: np.ndarray, top: float | None = None) -> ScalingCurve:
    """Fits all forms to the mean over seeds, chooses one, and resamples the seeds for intervals.

    A seed is drawn with its scores of all sizes, as their subsets lie inside each other. An interval is the estimate
    plus and minus Student's t of S - 1 degrees times the deviation over the resamples times sqrt(S / (S - 1)): of so
    few seeds, percentiles would promise too much. Of up to 5 seeds all multisets are taken, each with its chance, of
    more 500 random ones.

    Args:
        sizes_K: ascending, at least 3.
        scores_SK: finite; row s is a seed.
        top: the score of a perfect model, which errors are counted from; None compares scores as they are.
    Raises: UserError for too few or unordered sizes, or scores that are not finite or not [S, K].
    """
    sizes, scores_SK = np.asarray(sizes_K, dtype=np.float64), np.asarray(scores_SK, dtype=np.float64)
    if len(sizes) < FEWEST_SIZES or (np.diff(sizes) <= 0).any() or sizes[0] <= 0:
        raise UserError(f"a curve needs {FEWEST_SIZES} or more sizes in ascending order, and not {[*sizes_K]}")
    if scores_SK.ndim != 2 or scores_SK.shape[1] != len(sizes) or not len(scores_SK):
        raise UserError(f"scores of {len(sizes)} sizes are [S, {len(sizes)}], one row a seed, not {scores_SK.shape}")
    if not np.isfinite(scores_SK).all():
        raise UserError("a score is not finite; leave out its seed, or train it again")
    mean_K, draws = scores_SK.mean(axis=0), _resamples(len(scores_SK))
    chances = tuple(chance for _, chance in draws)
    fits = tuple(
        FormFit(
            fit(form, sizes, mean_K, top),
            _left_out(form, sizes, mean_K, top),
            tuple(fit(form, sizes, share_S @ scores_SK, top) for share_S, _ in draws),
            tuple(_left_out(form, sizes, share_S @ scores_SK, top) for share_S, _ in draws),
            chances,
            len(scores_SK),
        )
        for form in FORMS
        if form.unknowns < len(sizes)
    )
    least = min(one.left_out for one in fits)
    best = next(one for one in fits if one.left_out <= least + EQUAL)
    notes = (*_few(len(sizes), len(scores_SK)), *_alike(sizes, fits, best), *_bends(sizes, scores_SK, top))
    return ScalingCurve(tuple(int(size) for size in sizes_K), top, fits, best, notes)


def _left_out(form: CurveForm, sizes_K: np.ndarray, scores_K: np.ndarray, top: float | None) -> float:
    said = fit(form, sizes_K[:-1], scores_K[:-1], top).at(float(sizes_K[-1]))
    if top is None:
        return abs(said - float(scores_K[-1]))
    both = np.log(errors(np.array([*scores_K, said]), top))
    return float(abs(both[-1] - both[-2]))


def _resamples(count: int) -> list[tuple[np.ndarray, float]]:
    """(share of each seed [S], chance) of samples of `count` seeds with replacement."""
    if count <= 5:
        rows = [np.bincount(of, minlength=count) for of in combinations_with_replacement(range(count), count)]
        ways = [math.factorial(count) / math.prod(math.factorial(int(n)) for n in row) for row in rows]
        return [(row / count, way / count**count) for row, way in zip(rows, ways, strict=True)]
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=MOST_RESAMPLES)
    return [(row / count, 1 / MOST_RESAMPLES) for row in drawn]


def _few(sizes: int, seeds: int) -> list[str]:
    notes = []
    if sizes == FEWEST_SIZES:
        notes.append(
            "three sizes determine the log-linear form alone; a curve that bends looks straight here. Add a size"
        )
    elif sizes == FEWEST_SIZES + 1:
        notes.append("four sizes cannot separate a logarithm from a power law, whatever the errors say. Add a size")
    if seeds < 2:
        notes.append("one seed: no interval can be given. Add seeds")
    return notes


def _alike(sizes_K: np.ndarray, fits: Sequence[FormFit], best: FormFit) -> list[str]:
    alike = [best, *(one for one in fits if one is not best and not _is_worse(one, best))]
    if len(alike) < 2:
        return []
    far = 10 * float(sizes_K[-1])
    said = ", ".join(f"{one.law.at(far):.4g} by the {one.law.form.name}" for one in alike)
    return [
        f"the points cannot separate {len(alike)} forms: they predict the largest size equally well, as far as these "
        f"seeds tell. Of ten times the data they say {said}"
    ]


def _is_worse(one: FormFit, best: FormFit) -> bool:
    """Whether it misses the largest size by more than the best form in 95 % of such seeds."""
    more = [a - b for a, b in zip(one.drawn_left_out, best.drawn_left_out, strict=True)]
    least = _interval(one.left_out - best.left_out, more, one.chances, one.seeds).low
    return least is not None and least > 0


def _bends(sizes_K: np.ndarray, scores_SK: np.ndarray, top: float | None) -> list[str]:
    """Whether the slope at the end is below that at the beginning by more than chance, and how near the top is."""
    slope_SK = np.diff(scores_SK, axis=1) / np.diff(np.log10(sizes_K))
    first, last = slope_SK[:, 0].mean(), slope_SK[:, -1].mean()
    lost_S = np.sign(first) * (slope_SK[:, 0] - slope_SK[:, -1])
    notes = []
    if (seeds := len(lost_S)) > 1:
        reach = float(stdtrit(seeds - 1, 0.975)) * lost_S.std(ddof=1) / math.sqrt(seeds)
        if lost_S.mean() > reach + EQUAL * max(abs(first), abs(last)):  # more than rounding
            notes.append(
                f"the curve bends: {first:+.3g} per decade between the first two sizes and {last:+.3g} between the "
                "last two, so that b of a straight line says too much of the next decade"
            )
    if top is not None and abs(top - scores_SK[:, -1].mean()) <= NEAR_TOP * abs(top or 1.0):
        notes.append(f"the score is saturated, within 2 % of {top:g}: compare errors, or take a harder task")
    return notes
