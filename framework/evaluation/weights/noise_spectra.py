"""The singular values of a matrix beside those of noise: which directions stand out of what a random matrix has.

The null is a matrix of independent entries of mean 0 and one variance. Its squared singular values, over the longer
side and the variance, follow the Marchenko-Pastur law (Mat. Sb. 114, 1967), and the largest one fluctuates by the
Tracy-Widom law of order 1 around a centre that is not quite the law's edge. Both numbers for finite sizes are
those of Johnstone (Ann. Statist. 29, 2001) with the corrections by a half of Ma (Bernoulli 18, 2012); the law itself is
the shifted Gamma of Chiani (J. Multivariate Anal. 129, 2014), whose quantiles are within 0.03 up to that of 99.9 %.

The noise is not known but estimated. Candidates are what stands out of noise of the bulk's median, which few strong
directions hardly move (Gavish, Donoho, IEEE Trans. Inf. Theory 60, 2014); from the weakest on they are then tested by
the energy that is left (as Kritchman, Nadler, IEEE Trans. Signal Process. 57, 2009), which is a far sharper estimate.
Trained weights are no noise plus a few directions: `NoiseFit.misfit` says how far from it they are.

Shapes: S singular values, M <= N sides of the matrix, P places at which a function is asked.
"""

import math
from dataclasses import dataclass

import torch
from scipy.special import gammaincinv
from torch import Tensor

CHANCE = 0.01
"""Of a matrix of pure noise to have a direction above the edge."""
FEWEST = 16
"""Singular values that a median of noise is taken of; smaller matrices have no null."""
ZERO = 1e-6
"""Share of the largest singular value from which on one counts: from a Gram, smaller ones are rounding."""
_STEPS = 4096


@dataclass(frozen=True)
class NoiseFit:
    """What noise explains of singular values.

    Attributes:
        noise: standard deviation of the entries of the noise; 0 for a matrix of low rank, all of which stands out.
        edge: singular value that the strongest direction of such noise exceeds once in 1 / `CHANCE` matrices.
        above: directions above the edge.
        misfit: largest distance (Kolmogorov-Smirnov) of the distribution of the others from Marchenko and Pastur's, in
            [0, 1]: near 0 for noise.
    """

    noise: float
    edge: float
    above: int
    misfit: float


def marchenko_pastur_edges(aspect: float) -> tuple[float, float]:
    """Least and greatest x of the law with aspect M / N in (0, 1]: (1 -+ sqrt(aspect))^2."""
    return (1 - math.sqrt(aspect)) ** 2, (1 + math.sqrt(aspect)) ** 2


def marchenko_pastur(aspect: float, x_P: Tensor) -> Tensor:
    """Share of the squared singular values, over N times the variance, that lie below each x: float64 [P]."""
    at, share = _law(aspect)
    return _interpolated(x_P.double(), at, share)


def marchenko_pastur_quantiles(aspect: float, share_P: Tensor) -> Tensor:
    """The x below which a share in [0, 1] lies, float64 [P]."""
    at, share = _law(aspect)
    return _interpolated(share_P.double(), share, at)


def largest_of_noise(rows: int, columns: int, chance: float = CHANCE) -> float:
    """What the largest singular value of a matrix of standard normal entries exceeds with this chance."""
    one, other = math.sqrt(rows - 0.5), math.sqrt(columns - 0.5)
    centre, width = (one + other) ** 2, (one + other) * (1 / one + 1 / other) ** (1 / 3)
    return math.sqrt(max(0.0, centre + width * tracy_widom_quantile(1 - chance)))


def tracy_widom_quantile(share: float) -> float:
    """Of the Tracy-Widom law of order 1, by Chiani's approximation."""
    return 0.186054 * float(gammaincinv(46.446, share)) - 9.84801


def fit_noise(values_S: Tensor, rows: int, columns: int) -> NoiseFit | None:
    """Fits the noise of a matrix to all of its singular values, descending [min(rows, columns)].

    None where there is no noise to fit: fewer than `FEWEST` values, or half of them standing out.
    """
    values_S = values_S.double()
    if len(values_S) < FEWEST:
        return None
    short, long = sorted((rows, columns))
    rank = int((values_S > ZERO * values_S[0]).sum())
    if rank <= short // 2:  # the median is zero
        return NoiseFit(0.0, ZERO * float(values_S[0]), rank, 0.0)
    most = short // 2
    above = min(most, _candidates(values_S, short, long))
    # A candidate is judged by noise that counts it as noise too: without it, noise of few values looks too weak.
    while above and values_S[above - 1] <= _noise(values_S, short, long, above - 1) * largest_of_noise(
        short - above + 1, long - above + 1
    ):
        above -= 1
    if above == most:
        return None
    left = short - above, long - above
    noise = _noise(values_S, short, long, above)
    edge = noise * largest_of_noise(*left)
    scaled_S = (values_S[above:].flip(0) / noise).square() / left[1]
    below_S = marchenko_pastur(left[0] / left[1], scaled_S)
    step_S = torch.arange(len(below_S) + 1, dtype=torch.float64) / len(below_S)
    misfit = torch.maximum((below_S - step_S[:-1]).abs(), (below_S - step_S[1:]).abs()).max()
    return NoiseFit(noise, edge, above, float(misfit))


def _candidates(values_S: Tensor, short: int, long: int) -> int:
    """How many directions are above half of the largest ones that noise of the bulk's median has."""
    above = 0
    while above <= short // 2:
        left = short - above, long - above
        law = marchenko_pastur_quantiles(left[0] / left[1], torch.tensor([0.5]))
        noise = float(values_S[above:].median() / (law * left[1]).sqrt())
        found = int((values_S > noise * largest_of_noise(*left, chance=0.5)).sum())
        if found <= above:
            break
        above = found
    return above


def _noise(values_S: Tensor, short: int, long: int, above: int) -> float:
    """Standard deviation of the entries of what is left without the first directions, of noise."""
    return float(values_S[above:].square().sum() / ((short - above) * (long - above))) ** 0.5


def values_of_noise(fit: NoiseFit, rows: int, columns: int, place_P: Tensor) -> Tensor:
    """The singular values that the noise alone would have at these places, 0 the strongest: float64 [P]."""
    short, long = sorted((rows, columns))
    share_P = 1 - (place_P.double() + 0.5) / short
    return fit.noise * (marchenko_pastur_quantiles(short / long, share_P) * long).sqrt()


def _law(aspect: float) -> tuple[Tensor, Tensor]:
    """(x, share below x), by the midpoint rule after x = centre - radius cos t, which has no singular end."""
    low, high = marchenko_pastur_edges(aspect)
    centre, radius = (low + high) / 2, (high - low) / 2
    edges = torch.linspace(0, math.pi, _STEPS + 1, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    density = (radius * middle.sin()).square() / (centre - radius * middle.cos())
    share = torch.cat([torch.zeros(1, dtype=torch.float64), density.cumsum(0)])
    return centre - radius * edges.cos(), share / share[-1].clone()


def _interpolated(x_P: Tensor, at: Tensor, value: Tensor) -> Tensor:
    """Linear between ascending places `at`, and constant beyond them."""
    place_P = torch.searchsorted(at, x_P).clamp(1, len(at) - 1)
    left, right = at[place_P - 1], at[place_P]
    part_P = ((x_P - left) / torch.where(right > left, right - left, 1)).clamp(0, 1)
    return value[place_P - 1] + part_P * (value[place_P] - value[place_P - 1])
