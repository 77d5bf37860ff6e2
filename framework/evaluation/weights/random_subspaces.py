"""What random subspaces have in common: the noise floor of an overlap and of the smallest principal angle.

Two subspaces of dimensions r and s, uniformly random in n dimensions, have tr(P Q) = sum of cos^2 of their principal
angles with mean r s / n and variance 2 r s (n - r) (n - s) / (n^2 (n - 1) (n + 2)). The squared cosines are the
eigenvalues of a Jacobi ensemble; the largest one, as its logit, follows the Tracy-Widom law with the centre and width
of Johnstone (Ann. Statist. 36, 2008, theorem 1). For r = 1 both are the Beta law with (s / 2, (n - s) / 2), exactly.
"""

import math

from scipy.special import betaincinv, expit

from lightspan.evaluation.weights.noise_spectra import tracy_widom_quantile


def mean_overlap(width: int, one: int, other: int) -> float:
    """Mean of tr(P Q) / min(r, s), the mean squared cosine, of random subspaces of these dimensions."""
    return max(one, other) / width


def overlap_floor(width: int, one: int, other: int, share: float = 0.95) -> float:
    """The mean squared cosine below which that share of random pairs lies: by the Beta law of the right mean and
    variance.
    """
    least = min(one, other)
    mean = mean_overlap(width, one, other)
    free = (width - one) * (width - other)
    variance = 2 * one * other * free / (width**2 * max(1, width - 1) * (width + 2)) / least**2
    if not variance:
        return mean
    total = mean * (1 - mean) / variance - 1
    return float(betaincinv(mean * total, (1 - mean) * total, share))


def angle_floor(width: int, one: int, other: int, share: float = 0.95) -> float:
    """The smallest principal angle, in radians, that so many of random pairs exceed; 0 where dimensions add up to the
    width, at which the law ends, or more, where all pairs meet.
    """
    if one + other >= width:
        return 0.0
    if 1 in (one, other):
        largest = float(betaincinv(max(one, other) / 2, (width - max(one, other)) / 2, share))
        return math.acos(math.sqrt(largest))
    # Johnstone's p, n and m of the ensemble: Gram matrices of an r-dimensional frame's s rows, and of the other n - s.
    least, most = sorted((one, other))
    total = width - 1
    gamma = 2 * math.asin(math.sqrt((least - 0.5) / total))
    phi = 2 * math.asin(math.sqrt((most - 0.5) / total))
    centre = 2 * math.log(math.tan((phi + gamma) / 2))
    cube = 16 / total**2 / (math.sin(phi + gamma) ** 2 * math.sin(phi) * math.sin(gamma))
    return math.acos(math.sqrt(expit(centre + cube ** (1 / 3) * tracy_widom_quantile(share))))


def cosine_ceiling(width: int, directions: int, share: float = 0.95) -> float:
    """What the largest |cosine| of a random direction with so many orthonormal ones stays below in that share of cases:
    squared cosines follow the Beta law with (1 / 2, (width - 1) / 2), here as if independent.
    """
    if width < 2 or not directions:
        return 1.0 if directions else 0.0
    return math.sqrt(betaincinv(0.5, (width - 1) / 2, share ** (1 / directions)))
